// Index arithmetic: padded rows and columns, tiles of pairs, fragments of the matrix instructions.
// Host functions too, so that a C++ test can hold them against the definitions.
#pragma once

#include "mkmmd/cuda/portable.cuh"

namespace padkern {
namespace cuda {

// Rows are packed in tiles of one sample each: the source's tiles, then the target's.
constexpr int kTile = 64;
// Columns are padded to the depth of one matrix instruction.
constexpr int kStep = 16;
// Columns of both operands that one stage of the streamed product holds.
constexpr int kChunk = 64;
// A row in shared memory is 16 bytes longer than its data: with a width of 16 n elements that makes
// an odd number of 16-byte units, so the eight rows that ldmatrix reads at once lie in different
// banks.
constexpr int kRowPad = 8;
constexpr int kThreads = 128;  // four warps, 16 rows of the tile each

// Columns up to which a block keeps the gradients of its rows in registers. Wider ones are "deep".
constexpr int kMaxGradientWidth = 256;

PADKERN_HD int padded_width(int64_t dim) { return static_cast<int>(round_up(dim, kStep)); }
PADKERN_HD int64_t tile_count(int64_t rows) { return ceil_div(rows, kTile); }

// ---- fragments of mma.m16n8k16
// -------------------------------------------------------------------- Lane l: group = l / 4, pair
// = l % 4. Of the 16 x 8 result it holds rows group (elements 0, 1) and group + 8 (2, 3), columns 2
// pair (0, 2) and 2 pair + 1 (1, 3).
PADKERN_HD int result_row(int lane, int element) { return (lane >> 2) + ((element >> 1) << 3); }
PADKERN_HD int result_column(int lane, int element) { return ((lane & 3) << 1) + (element & 1); }
// Left operand, 16 x 16: four words of two columns each.
PADKERN_HD int left_row(int lane, int word) { return (lane >> 2) + ((word & 1) << 3); }
PADKERN_HD int left_column(int lane, int word) { return ((lane & 3) << 1) + ((word >> 1) << 3); }
// Right operand, 16 (depth) x 8: two words of two depths each.
PADKERN_HD int right_depth(int lane, int word) { return ((lane & 3) << 1) + (word << 3); }
PADKERN_HD int right_column(int lane) { return lane >> 2; }

// ---- what each lane points at for ldmatrix.x4 (lanes 8 q .. 8 q + 7: the rows of matrix q)
// -------- 16 x 16 block stored by rows; gives the four words of a left operand. Transposed, the
// same addresses give two right operands of 16 x 8 whose depth runs along the stored rows.
PADKERN_HD int block_row(int lane) { return lane & 15; }
PADKERN_HD int block_column(int lane) { return (lane >> 4) << 3; }
// 16 stored rows as two right operands whose depth runs along the stored columns: words 0 and 1 are
// the operand of rows 0 to 7, words 2 and 3 that of rows 8 to 15.
PADKERN_HD int pair_row(int lane) { return (lane & 7) + ((lane >> 4) << 3); }
PADKERN_HD int pair_column(int lane) { return ((lane >> 3) & 1) << 3; }

// ---- which pair of tiles
// ---------------------------------------------------------------------------
struct TilePair {
  int64_t row;
  int64_t column;
};

// Pairs that the value needs: the upper triangle, or source x target for the cross estimator.
PADKERN_HD int64_t pair_count(int64_t source_tiles, int64_t target_tiles, bool cross_only) {
  const int64_t tiles = source_tiles + target_tiles;
  return cross_only ? source_tiles * target_tiles : tiles * (tiles + 1) / 2;
}

// Column by column, so that neighbours in time share a column.
PADKERN_HD TilePair pair_at(int64_t index, int64_t source_tiles, bool cross_only) {
  if (cross_only) return {index % source_tiles, source_tiles + index / source_tiles};
  int64_t column = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(index) + 1.0) - 1.0) * 0.5);
  // The root may be one off.
  while (column * (column + 1) / 2 > index) --column;
  while ((column + 1) * (column + 2) / 2 <= index) ++column;
  return {index - column * (column + 1) / 2, column};
}

// Column tiles that a row tile of the gradient meets: all, or for the cross estimator those of the
// other sample; `split` of `splits` nearly equal ranges.
struct TileRange {
  int64_t begin;
  int64_t end;
};

PADKERN_HD TileRange column_range(int64_t row_tile, int64_t source_tiles, int64_t target_tiles,
                                  bool cross_only, int split, int splits) {
  int64_t begin = 0;
  int64_t count = source_tiles + target_tiles;
  if (cross_only) {
    const bool source = row_tile < source_tiles;
    begin = source ? source_tiles : 0;
    count = source ? target_tiles : source_tiles;
  }
  return {begin + count * split / splits, begin + count * (split + 1) / splits};
}

// Row tiles alone do not fill the machine when there are few rows: columns are then split too, and
// the parts added in order. From 128 row tiles on there is one part, which bounds the memory. The
// number depends on the sizes only, so that results do not depend on the device.
PADKERN_HD int split_count(int64_t source_tiles, int64_t target_tiles) {
  const int64_t tiles = source_tiles + target_tiles;
  if (tiles >= 128) return 1;
  return static_cast<int>(smaller<int64_t>(smaller<int64_t>(8, 256 / tiles), tiles));
}

}  // namespace cuda
}  // namespace padkern
