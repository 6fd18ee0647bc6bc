"""The planted bugs: each a replacement of text that occurs exactly once in a file.

``tests/test_mutants.py`` checks that every text is still there; ``run.py`` plants them.
"""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One bug.

    Attributes:
        name: Short and unique.
        file: Path from the root of the checkout.
        old: Text that occurs exactly once in the file.
        new: What replaces it.
        tests: Selections of pytest, each its command line; tried in turn until one fails.
        environment: Variables for the tests.
        needs: Package without which there is nothing to test.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[tuple[str, ...], ...]
    environment: tuple[tuple[str, str], ...] = ()
    needs: str = "torch"

    @property
    def is_native(self) -> bool:
        """Whether the extension has to be built again."""
        return self.file.startswith("csrc/")


def _select(file: str, words: str = "") -> tuple[tuple[str, ...], ...]:
    return ((f"tests/{file}.py", *(("-k", words) if words else ())),)


NATIVE = _select("test_op_matrix", "matches_the_reference and mkmmd and native")
REFERENCE = _select("test_mkmmd_reference")
DERIVATIVES = _select("test_op_policies", "gradcheck and mkmmd")
GRAD_OUTPUT = _select("test_op_policies", "mkmmd and (grad_output or loss_scaling)")
ERRORS = _select("test_op_policies", "bad_input and mkmmd")
SCHEMA = _select("test_op_policies", "mkmmd and (fakes or raw_ops)")
BITS = _select("test_op_matrix", "bits and mkmmd")
FAR = _select("test_op_layouts", "beyond_32_bits and mkmmd")
MASKS = _select("test_mkmmd", "mask or nan")
GATED = _select("test_op_matrix", "matches_the_reference and gated_bce and native")
RANKS = _select("test_op_matrix", "matches_the_reference and count_ranks")
BEST_ITEMS = _select("test_ranking_native")
CATALOGUE = _select("test_op_matrix", "matches_the_reference and catalogue_loss and reference")
CATALOGUE_CORE = _select("test_op_matrix", "matches_the_reference and catalogue_loss and native")
TABLE = _select("test_op_matrix", "matches_the_reference and gated_table and native")

OP = "padkern/ops/mkmmd/op.py"
REF = "padkern/ops/mkmmd/reference.py"
KERNEL = "csrc/mkmmd/mkmmd_kernel.cpp"
TERMS = "csrc/mkmmd/kernel_terms.h"
RUN = "csrc/mkmmd/mkmmd_run.h"
ROWS = "csrc/mkmmd/mkmmd_rows.h"
WEIGHTS = "csrc/mkmmd/mkmmd_weights.h"

PYTHON = (
    Mutant(
        "grad_output_ignored",
        OP,
        "out = saved * (grad_value if grad_value.dtype == dtype else grad_value.to(dtype))",
        "out = saved * 1.0",
        GRAD_OUTPUT,
    ),
    Mutant(
        "cast_before_scaling",
        OP,
        "out = saved * (grad_value if grad_value.dtype == dtype else grad_value.to(dtype))",
        "out = saved.to(sample.dtype).to(dtype) * grad_value.to(dtype)",
        GRAD_OUTPUT,
    ),
    Mutant(
        "second_derivative_not_refused",
        OP,
        "second_order = torch.is_grad_enabled() and not torch.compiler.is_compiling()",
        "second_order = False",
        _select("test_op_policies", "second_derivatives and mkmmd"),
    ),
    Mutant(
        "fake_of_target_has_the_shape_of_source",
        OP,
        "target.new_empty(target.shape, dtype=dtype)",
        "target.new_empty(source.shape, dtype=dtype)",
        SCHEMA,
    ),
    Mutant(
        "gradients_of_alphas_and_betas_swapped",
        OP,
        "_DIFFERENTIABLE = (0, 1, 2, 5, 6)",
        "_DIFFERENTIABLE = (0, 1, 2, 6, 5)",
        _select("test_op_transforms", "torch_func and mkmmd-native"),
    ),
    Mutant(
        "reference_normalises_by_all_pairs",
        REF,
        "same.append(pairs / (total.square() - squares))",
        "same.append(pairs / total.square())",
        REFERENCE,
    ),
    Mutant(
        "reference_counts_the_diagonal",
        REF,
        "off = torch.where(diagonal, torch.zeros_like(values), values)",
        "off = values",
        REFERENCE,
    ),
    Mutant(
        "reference_forgets_betas",
        REF,
        "total = total + beta * kernel_profile(",
        "total = total + 1.0 * kernel_profile(",
        _select("test_op_policies", "gradcheck and mkmmd-native") + NATIVE,
    ),
    Mutant(
        "median_zero_stays_zero",
        REF,
        "return torch.where(median == 0, mean, median)",
        "return median",
        REFERENCE,
    ),
    Mutant(
        "alphas_may_be_negative",
        "padkern/_validation.py",
        "if not 0.0 < alpha < math.inf:  # also false for NaN",
        "if not -math.inf < alpha < math.inf:  # also false for NaN",
        ERRORS,
    ),
    Mutant(
        "weights_of_any_length",
        "padkern/_validation.py",
        "if tuple(value.shape) != (sample.shape[0],):",
        "if value.dim() != 1:",
        ERRORS,
    ),
    Mutant(
        "launcher_takes_weights_for_dense",
        "padkern/ops/mkmmd/native.py",
        "weight_stride = weight.stride(0)",
        "weight_stride = 1",
        NATIVE,
    ),
    Mutant(
        "gated_gradient_scaled_only_below_one",
        "padkern/ops/triple_expert/op.py",
        "grad_value.item() == 1.0",
        "grad_value.item() >= 1.0",
        _select("test_op_policies", "gated_bce and (grad_output or loss_scaling)"),
    ),
    Mutant(
        "gbce_weight_of_summed_negatives",
        "padkern/ops/triple_expert/calibration.py",
        "return gbce_beta(negatives, candidates, calibration) / negatives",
        "return gbce_beta(negatives, candidates, calibration)",
        _select("test_triple_expert_op", "gbce or beta"),
    ),
    Mutant(
        "gbce_counts_items_that_are_never_drawn",
        "padkern/pad/phases.py",
        "gbce_positive_weight(loss.negatives, len(self.candidates()), loss.calibration)",
        "gbce_positive_weight(loss.negatives, len(self.train_frequency) - 1, loss.calibration)",
        _select("test_phases", "gbce"),
    ),
    Mutant(
        "gated_mask_by_multiplication",
        "padkern/ops/triple_expert/reference.py",
        "users = torch.where(valid[:, None, None], users, torch.zeros_like(users))",
        "users = users * valid[:, None, None]",
        _select("test_triple_expert_op", "masked"),
    ),
    Mutant(
        "ties_rank_behind",
        "padkern/ops/ranking/reference.py",
        "ranks = 1.0 + greater.double() + 0.5 * equal.double()",
        "ranks = 1.0 + greater.double() + equal.double()",
        RANKS,
    ),
    Mutant(
        "padding_item_is_ranked",
        "padkern/ops/ranking/reference.py",
        "            scores[:, 0] = torch.nan\n        scores[rows",
        "            pass\n        scores[rows",
        RANKS,
    ),
    Mutant(
        "catalogue_loses_the_largest_logit",
        "padkern/ops/catalogue_loss/reference.py",
        "total += (mass.log() + top - positive)",
        "total += (mass.log() - positive)",
        CATALOGUE,
    ),
)

NATIVE_CORE = (
    Mutant(
        "ladder_loses_a_term",
        TERMS,
        "constexpr int kCount = PATH == TermPath::kLadder5 ? 5 : 1;",
        "constexpr int kCount = PATH == TermPath::kLadder5 ? 4 : 1;",
        NATIVE,
    ),
    Mutant(
        "laplacian_without_its_two",
        TERMS,
        "const Vec<T> root = square_root(r * T(2));",
        "const Vec<T> root = square_root(r);",
        NATIVE,
    ),
    Mutant(
        "last_tile_column_dropped",
        KERNEL,
        "const int64_t vectors = (in.b.rows + kLanes - 1) / kLanes;",
        "const int64_t vectors = in.b.rows / kLanes;",
        NATIVE,
    ),
    Mutant(
        "diagonal_counted",
        KERNEL,
        "weights[first + i] = T(0);",
        "",
        NATIVE,
    ),
    Mutant(
        "rows_of_four_share_one_square",
        KERNEL,
        "squares + row_square[i]",
        "squares + row_square[0]",
        NATIVE,
    ),
    Mutant(
        "last_group_of_columns_missing_from_the_gram_product",
        KERNEL,
        "const int64_t steps = panels * groups.count;",
        "const int64_t steps = panels * (groups.count > 1 ? groups.count - 1 : 1);",
        NATIVE,
    ),
    Mutant(
        "transposed_product_missing",
        KERNEL,
        "    if (!diagonal) {\n      tile_columns<T, 1, kLd, true>",
        "    if (false) {\n      tile_columns<T, 1, kLd, true>",
        NATIVE,
    ),
    Mutant(
        "swapped_strides",
        ROWS,
        "const int64_t step = source.column_stride;",
        "const int64_t step = source.row_stride;",
        NATIVE,
    ),
    Mutant(
        "mask_by_multiplication",
        ROWS,
        "    if (block.weights[i] == T(0)) {",
        "    if (false) {",
        MASKS,
    ),
    Mutant(
        "subnormal_halves_flushed",
        ROWS,
        "float value = __builtin_bit_cast(float, magnitude) * 5.192296858534828e33f;",
        "float value = magnitude < (1u << 23) ? 0.0f\n"
        "      : __builtin_bit_cast(float, magnitude) * 5.192296858534828e33f;",
        _select("test_op_policies", "subnormal and mkmmd-native"),
    ),
    Mutant(
        "offset_of_32_bits",
        RUN,
        "cut_.first_row(block) * s.row_stride * size;",
        "static_cast<int32_t>(cut_.first_row(block) * s.row_stride) * size;",
        FAR,
    ),
    Mutant(
        "bandwidth_off_by_two",
        RUN,
        "return 2.0 * moment / (weights_[0].sum + weights_[1].sum);",
        "return moment / (weights_[0].sum + weights_[1].sum);",
        NATIVE,
    ),
    Mutant(
        "sums_in_single_precision",
        RUN,
        "      total.same += ordered * sums.kernel;",
        "      total.same += static_cast<float>(ordered * sums.kernel);",
        NATIVE,
    ),
    Mutant(
        "biased_without_its_diagonal",
        RUN,
        "source_same += kernel_at_zero() * weights_[0].squares;",
        "",
        NATIVE,
    ),
    Mutant(
        "alpha_gradients_in_sorted_order",
        RUN,
        "const int u = terms_.order[place];",
        "const int64_t u = place;",
        NATIVE,
    ),
    Mutant(
        "gradient_finished_too_early",
        RUN,
        "      wait_for(buffers_.progress[b], seats_);\n",
        "",
        BITS,
    ),
    Mutant(
        "pair_does_not_wait_for_its_turn",
        RUN,
        "    wait_for(buffers_.progress[a], round + 1);\n",
        "",
        BITS,
    ),
    Mutant(
        "weights_normalised_by_their_sum",
        WEIGHTS,
        "moments[k].sum * moments[k].sum - (unbiased ? moments[k].squares : 0.0);",
        "moments[k].sum * moments[k].sum - (unbiased ? moments[k].sum : 0.0);",
        NATIVE,
    ),
    Mutant(
        "target_competes_with_itself",
        "csrc/ranking/ranking_run.h",
        "if (target != 0 && !masked) out[size++] = own_[u] = position(target);",
        "if (target != 0 && !masked) own_[u] = position(target);",
        RANKS,
    ),
    Mutant(
        "user_stops_at_the_limit_itself",
        "csrc/ranking/ranking_run.h",
        "rank(counts(u)) > limit;",
        "rank(counts(u)) >= limit;",
        RANKS,
    ),
    Mutant(
        "target_scores_rounded_twice",
        "csrc/ranking/ranking_kernel.cpp",
        "  return __builtin_fmaf(a, b, sum);",
        "  const volatile float product = a * b;\n  return sum + product;",
        BEST_ITEMS,
    ),
    Mutant(
        "later_item_of_lower_id_loses_its_tie",
        "csrc/ranking/ranking_rows.h",
        "full && in.items.order != nullptr ? row_bits<T, VECS, true>",
        "false ? row_bits<T, VECS, true>",
        BEST_ITEMS,
    ),
    Mutant(
        "catalogue_sums_not_rescaled",
        "csrc/catalogue_loss/catalogue_loss_kernel.cpp",
        "store(row + d, load(row + d) * factor[t]);",
        "store(row + d, load(row + d));",
        CATALOGUE_CORE,
    ),
    Mutant(
        "catalogue_excludes_the_target",
        "csrc/catalogue_loss/catalogue_loss_run.h",
        "if (column >= 0 && column != targets_[t]) place(add, column, t);",
        "if (column >= 0) place(add, column, t);",
        CATALOGUE_CORE,
    ),
    Mutant(
        "catalogue_bias_gradient_without_target",
        "csrc/catalogue_loss/catalogue_loss_run.h",
        "        worker.row_sum[e.item] -= static_cast<double>(share);\n",
        "",
        CATALOGUE_CORE,
    ),
    Mutant(
        "catalogue_forgets_earlier_tokens",
        "csrc/catalogue_loss/catalogue_loss_run.h",
        "const bool fresh = first == 0;",
        "const bool fresh = true;",
        _select("test_catalogue_loss", "plans"),
    ),
    Mutant(
        "table_gate_gradient_of_one_block",
        "csrc/gated_table/gated_table_cpu.cpp",
        "for (int64_t b = 0; b < blocks; ++b) sum",
        "for (int64_t b = 0; b < 1; ++b) sum",
        TABLE,
    ),
    Mutant(
        "gated_gradient_without_the_weight",
        "csrc/triple_expert/gated_bce_cpu.cpp",
        "static_cast<T>(valid ? p.positive_weight / static_cast<double>(valid) : 0.0),",
        "static_cast<T>(valid ? 1.0 / static_cast<double>(valid) : 0.0),",
        GATED,
    ),
    Mutant(
        "gated_last_columns_dropped",
        "csrc/triple_expert/gated_bce_kernel.cpp",
        "  for (; i < dim; ++i) total += a[i] * b[i];",
        "",
        GATED,
    ),
    Mutant(
        "id_check_off_by_one",
        "csrc/common/checks.h",
        "const uint64_t span = static_cast<uint64_t>(high) - first;",
        "const uint64_t span = static_cast<uint64_t>(high) - first + 1;",
        _select("test_raw_ops", "too_many"),
    ),
)

RAW = _select("test_raw_ops", "broken")
RAW_OPS = (
    Mutant(
        "launcher_takes_any_size_of_a_tensor",
        "padkern/ops/launch.py",
        "size != want and not isinstance(want, str)",
        "False",
        RAW,
    ),
    Mutant(
        "launcher_takes_any_dtype",
        "padkern/ops/launch.py",
        "if x.dtype != dtype:",
        "if False:",
        RAW,
    ),
    Mutant(
        "offsets_may_end_anywhere",
        "csrc/common/checks.h",
        "return before == total ? -1 : count;",
        "return -1;",
        RAW,
    ),
)

PLAN = "csrc/batch_plan/batch_plan.cpp"
BATCH_PLAN = (
    Mutant(
        "plan_draws_the_users_own_items",
        PLAN,
        "if (!std::binary_search(own, own_end, item)) return item;\n    }\n    // Nearly",
        "return item;\n    }\n    // Nearly",
        _select("test_batch_plan", "own"),
    ),
    Mutant(
        "plan_negatives_repeat_over_slots",
        PLAN,
        "static_cast<uint32_t>(slot),",
        "0u,",
        _select("test_batch_plan", "native_equals_reference"),
    ),
    Mutant(
        "plan_slots_of_the_item_before",
        PLAN,
        "for (int64_t u = unique; u > 0; --u) starts[u] = starts[u - 1];",
        "",
        _select("test_batch_plan", "what_a_plan_holds"),
    ),
)

# In Triton's interpreter; the kernels have to be right before a GPU can make them anything else.
_INTERPRET = (("TRITON_INTERPRET", "1"),)


def _triton(name: str, file: str, old: str, new: str, words: str) -> Mutant:
    tests = _select("test_mkmmd_triton", words)
    return Mutant(name, f"padkern/ops/mkmmd/{file}", old, new, tests, _INTERPRET, "triton")


TRITON = (
    _triton(
        "triton_counts_padding_columns",
        "triton_pack.py",
        "norm = tl.where(row < rows, norm * scale, FAR)",
        "norm = norm * scale",
        "test_shapes",
    ),
    _triton(
        "triton_counts_the_diagonal",
        "triton_kernels.py",
        "return tl.where(row[:, None] == column[None, :], 0.0, x)",
        "return x",
        "test_shapes",
    ),
    _triton(
        "triton_loses_a_kernel",
        "triton_common.py",
        "for u in tl.static_range(1, COUNT):",
        "for u in tl.static_range(2, COUNT):",
        "test_shapes",
    ),
    _triton(
        "triton_counts_pairs_once",
        "triton_kernels.py",
        "factor *= 2  # a tile on the diagonal",
        "factor *= 1  # a tile on the diagonal",
        "test_shapes",
    ),
    _triton(
        "triton_takes_the_weights_of_the_first_problem",
        "triton_common.py",
        "weight = tl.load(weight_ptr + position * stride_weight, mask=valid, other=0)",
        "weight = tl.load(weight_ptr + row * stride_weight, mask=valid, other=0)",
        "ragged or batch",
    ),
)


def _head(name: str, file: str, old: str, new: str, test: str, words: str) -> Mutant:
    return Mutant(name, f"padkern/ops/{file}", old, new, _select(test, words), _INTERPRET, "triton")


TRITON_HEAD = (
    _head(
        "triton_item_gradient_skips_a_run",
        "triple_expert/triton_kernels.py",
        "first_piece = (begin + PIECE - 1) // PIECE",
        "first_piece = begin // PIECE",
        "test_triple_expert_triton",
        "long_runs",
    ),
    _head(
        "triton_gate_gradient_of_the_bin_before",
        "triton_bins.py",
        "tl.where(own[None, :] == bin_ids[:, None], value[None, :], 0.0)",
        "tl.where(own[None, :] == bin_ids[:, None] - 1, value[None, :], 0.0)",
        "test_gated_table_triton",
        "test_shapes",
    ),
    _head(
        "triton_mass_keeps_its_scale",
        "catalogue_loss/triton_kernels.py",
        "mass = mass * tl.exp(top - safe).to(tl.float64) + part",
        "mass = mass + part",
        "test_catalogue_loss_triton",
        "many_tiles",
    ),
    _head(
        "triton_excludes_the_own_target",
        "catalogue_loss/triton_gradient.py",
        'z = tl.where(excluded & ~hit, float("-inf"), z)',
        'z = tl.where(excluded, float("-inf"), z)',
        "test_catalogue_loss_triton",
        "dtypes_and_options",
    ),
    _head(
        "triton_cursor_stays",
        "catalogue_loss/triton_tile.py",
        "limit = base + walked.shape[0] + tl.min(walked, 0)",
        "limit = base + 1 + tl.min(walked, 0)",
        "test_catalogue_loss_triton",
        "dtypes_and_options",
    ),
)


def _sequence(name: str, op: str, file: str, old: str, new: str, words: str) -> Mutant:
    tests = _select(f"test_{op}_triton", words)
    return Mutant(name, f"padkern/ops/{op}/{file}", old, new, tests, _INTERPRET, "triton")


SEQUENCE = (
    _sequence(
        "triton_attention_forgets_the_sequence_of_a_mask",
        "short_attention",
        "triton_kernels.py",
        "counter1 = nothing + row.to(tl.uint32)[:, None]",
        "counter1 = nothing + 0 * row.to(tl.uint32)[:, None]",
        "options or cut",
    ),
    _sequence(
        "triton_attention_lets_nan_into_other_sequences",
        "short_attention",
        "triton_kernels.py",
        "x = tl.where(odd, 0.0, x)",
        "x = tl.where(odd, x, x)",
        "nan_and_infinity",
    ),
    _sequence(
        "triton_attention_leaves_tokens_of_nobody",
        "short_attention",
        "triton_tiles.py",
        "_store_nan(ptr, begin + longest, end, dim, stride, parts, part, BLOCK)",
        "_store_nan(ptr, end, end, dim, stride, parts, part, BLOCK)",
        "nobody",
    ),
    _sequence(
        "triton_ranks_break_ties_by_the_higher_id",
        "ranking",
        "triton_kernels.py",
        "((score == worst) & (id < worst_id))",
        "((score == worst) & (id > worst_id))",
        "best_items",
    ),
    _sequence(
        "triton_ranks_stop_one_too_early",
        "ranking",
        "triton_kernels.py",
        "<= 2 * tl.cast(at_most, tl.int64) - 2",
        "<= 2 * tl.cast(at_most, tl.int64) - 4",
        "beaten",
    ),
    _sequence(
        "triton_segments_skip_a_piece",
        "segments",
        "triton_impl.py",
        "for part in range(before, tl.load(ends_ptr + low)):",
        "for part in range(before + 1, tl.load(ends_ptr + low)):",
        "pieces",
    ),
    Mutant(
        "segments_skip_their_last_slot",
        "csrc/segments/segments_cpu.cpp",
        "s = begin + 1; s < end; ++s",
        "s = begin + 1; s + 1 < end; ++s",
        _select("test_op_matrix", "matches_the_reference and segment_sum and native"),
    ),
    Mutant(
        "expansion_forgets_its_segments",
        "padkern/ops/segments/op.py",
        "d_table = _sum(d_out, slots, starts, ctx.backend)",
        "d_table = _sum(d_out, slots.flip(0), starts, ctx.backend)",
        _select("test_segments", "expansion"),
    ),
)

ATTENTION = "csrc/short_attention/short_attention_kernel.cpp"
ADD_NORM = "csrc/dropout_add_norm/dropout_add_norm_kernel.cpp"
LINEAR = "csrc/linear/linear_kernel.cpp"
PACKED = _select("test_encoder_packing", "packed_equals_padded")

ENCODER = (
    Mutant(
        "attention_key_gradient_misses_the_own_query",
        ATTENTION,
        "if (PART == Part::kTermsFromRow) first = i;",
        "if (PART == Part::kTermsFromRow) first = i + 1;",
        _select("test_op_matrix", "matches_the_reference and short_attention and native"),
    ),
    Mutant(
        "attention_gradient_without_its_mean",
        ATTENTION,
        "own * (load(g + x) - mean) * view.scale",
        "own * load(g + x) * view.scale",
        _select("test_op_matrix", "matches_the_reference and short_attention and native"),
    ),
    Mutant(
        "attention_heads_share_their_masks",
        ATTENTION,
        "Words{} + static_cast<uint64_t>(head)};",
        "Words{} + static_cast<uint64_t>(0 * head)};",
        PACKED,
    ),
    Mutant(
        "norm_gradient_keeps_the_rows_own_direction",
        ADD_NORM,
        "(load(slope + c) - mean_slope - load(unit + c) * mean_product) * inverse",
        "(load(slope + c) - mean_slope) * inverse",
        _select("test_op_matrix", "matches_the_reference and dropout_add_norm and native"),
    ),
    Mutant(
        "norm_gradient_of_the_bias_without_its_mask",
        ADD_NORM,
        """      g *= keep;
      if (d_x != nullptr) store_part(d_x + c, g, left);
""",
        """      if (d_x != nullptr) store_part(d_x + c, g * keep, left);
""",
        _select("test_op_matrix", "matches_the_reference and dropout_add_norm and native"),
    ),
    Mutant(
        "linear_map_forgets_what_deep_rows_have_summed",
        LINEAR,
        "const Finish<T> finish = {k > 0, last && bias",
        "const Finish<T> finish = {k > 256, last && bias",
        _select("test_op_matrix", "matches_the_reference and linear and native"),
    ),
    Mutant(
        "weight_gradient_of_padding_columns",
        LINEAR,
        "scratch[i * kWidth + j] = j < b_columns ? right[i * b_stride + j] : T(0);",
        "scratch[i * kWidth + j] = right[i * b_stride + j / 2];",
        _select("test_op_matrix", "matches_the_reference and linear and native"),
    ),
    Mutant(
        "relu_passes_the_gradient_where_it_is_off",
        LINEAR,
        "to[j] = sign[j] <= T(0) ? T(0) : from[j];",
        "to[j] = sign[j] < T(0) ? T(0) : from[j];",
        _select("test_op_matrix", "matches_the_reference and linear and native"),
    ),
    Mutant(
        "places_share_their_masks",
        "padkern/models/encoder.py",
        '"seed": mix_seed(self.seed, place)',
        '"seed": mix_seed(self.seed, 0)',
        PACKED,
    ),
    Mutant(
        "masks_ignore_the_step",
        "padkern/models/encoder.py",
        "Masks(self.dropout, *packed.key)",
        "Masks(self.dropout, packed.key.seed, 0)",
        _select("test_encoder_packing", "key_alone"),
    ),
    Mutant(
        "gru_masks_follow_the_step_order",
        "padkern/models/gru4rec.py",
        "states = masks.drop(states, number + 1, order)",
        "states = masks.drop(states, number + 1)",
        _select("test_backbones", "packed_equals_padded"),
    ),
    Mutant(
        "caser_filters_before_the_start_give_zero",
        "padkern/models/caser.py",
        "torch.where(steps < lag, bias[part], response[:, part].roll(lag, 0))",
        "torch.where(steps < lag, 0.0, response[:, part].roll(lag, 0))",
        _select("test_backbones", "packed_equals_padded"),
    ),
    Mutant(
        "caser_window_reaches_into_the_sequence_before",
        "padkern/models/caser.py",
        "x.roll(lag, 0).masked_fill(steps < lag, 0.0)",
        "x.roll(lag, 0).masked_fill(steps < lag - 1, 0.0)",
        _select("test_backbones", "leaks or alone"),
    ),
)

GRID = (
    Mutant(
        "holm_without_its_steps",
        "padkern/pad/significance.py",
        "np.maximum.accumulate(values[order] * np.arange(values.size, 0, -1))",
        "values[order] * np.arange(values.size, 0, -1)",
        _select("test_compare", "holm"),
    ),
    Mutant(
        "best_method_chosen_on_test",
        "padkern/pad/grid/table.py",
        """methods[m]["valid"]["all"][_SELECT]""",
        """methods[m]["test"]["all"][_SELECT]""",
        _select("test_compare", "best_by_validation"),
    ),
    Mutant(
        "changed_results_are_believed",
        "padkern/pad/grid/cells.py",
        """if hashlib.sha256(data).hexdigest() != entries[name]["sha256"]:""",
        "if len(data) < 0:",
        _select("test_compare", "changed_result"),
    ),
    Mutant(
        "phases_are_shared_whatever_their_configuration",
        "padkern/pad/grid/shared.py",
        "facts = [phase, cell.data_id, config, device, threads or torch.get_num_threads()]",
        "facts = [phase, cell.data_id, device, threads or torch.get_num_threads()]",
        _select("test_shared_phases", "keeps_it_apart"),
    ),
    Mutant(
        "cells_do_not_wait_for_phases",
        "padkern/pad/grid/workers.py",
        "if not phases & trained), None)",
        "), None)",
        _select("test_shared_phases", "waits or same_time"),
    ),
    Mutant(
        "phases_in_common_count_for_each_cell",
        "padkern/pad/grid/budget.py",
        "costs += common.values()",
        "costs += [cost for estimate in estimates for cost in estimate.shared.values()]",
        _select("test_compare", "counts_once"),
    ),
    Mutant(
        "a_damaged_phase_stays",
        "padkern/pad/grid/shared.py",
        "            _discard(source)\n",
        "",
        _select("test_shared_phases", "damaged"),
    ),
)

EXPERTS = (
    Mutant(
        "experts_share_their_masks",
        "padkern/models/triple_expert.py",
        "packed.stream(number)",
        "packed.stream(0)",
        _select("test_encoder_packing", "own or shares"),
    ),
)

RIVALS = (
    Mutant(
        "ids_in_the_first_coordinates",
        "padkern/models/rivals.py",
        "F.pad(ids, (text.shape[1] - ids.shape[1], 0))",
        "F.pad(ids, (0, text.shape[1] - ids.shape[1]))",
        _select("test_methods", "alphafuse_keeps"),
    ),
    Mutant(
        "each_view_asks_itself",
        "padkern/models/rivals.py",
        "self.by_text(words, ids, packed)",
        "self.by_text(ids, ids, packed)",
        _select("test_methods", "dual_view"),
    ),
    Mutant(
        "autoencoder_divides_by_rows",
        "padkern/pad/item_to_item.py",
        "inverse /= -inverse.diagonal().clone()",
        "inverse /= -inverse.diagonal().clone()[:, None]",
        _select("test_classics", "ease"),
    ),
    Mutant(
        "penalty_forgets_the_frequency",
        "padkern/pad/ials.py",
        "return self._l2 * size**self._exponent",
        "return self._l2 * torch.ones_like(size)",
        _select("test_classics", "definition"),
    ),
)

READERS = (
    Mutant(
        "first_row_of_an_item_counts",
        "padkern/data/raw/events.py",
        "_, from_end = np.unique(codes[::-1], return_index=True)",
        "_, from_end = np.unique(codes, return_index=True)",
        _select("test_readers", "last_row_counts"),
    ),
    Mutant(
        "history_behind_the_clicks",
        "padkern/data/raw/mind.py",
        "early = np.full(int(lengths.sum()), np.iinfo(np.int64).min)",
        "early = np.full(int(lengths.sum()), np.iinfo(np.int64).max)",
        _select("test_readers", "history_then_clicks"),
    ),
    Mutant(
        "an_open_quote_takes_the_next_line",
        "padkern/data/raw/blocks.py",
        """if layout.quoting and b'"' in data:""",
        """if not layout.quoting and b'"' in data:""",
        _select("test_readers", "broken_rows and quote"),
    ),
)

ALIGNMENT = (
    Mutant(
        "infonce_looks_one_way",
        "padkern/pad/alignment.py",
        "0.5 * (scores.logsumexp(1) + scores.logsumexp(0))",
        "scores.logsumexp(1)",
        _select("test_alignment", "formula and infonce"),
    ),
    Mutant(
        "coral_divides_by_all_rows",
        "padkern/pad/alignment.py",
        "linear(columns, columns) / (count - 1)",
        "linear(columns, columns) / count",
        _select("test_alignment", "formula and coral"),
    ),
    Mutant(
        "hidden_items_keep_what_is_their_own",
        "padkern/models/gates.py",
        "own.masked_fill(unseen, 0.0)",
        "own",
        _select("test_gates", "hidden_items and per_item"),
    ),
    Mutant(
        "a_plan_reads_the_first_items_weights",
        "padkern/models/triple_expert.py",
        "positive_weight, items=plan.unique, valid",
        "positive_weight, items=torch.arange(len(plan.unique)), valid",
        _select("test_gates", "loss_of_a_plan"),
    ),
)

COLD = (
    Mutant(
        "token_weights_start_at_zero",
        "padkern/text/encoders.py",
        "weight = mask.cumsum(1) * mask",
        "weight = (mask.cumsum(1) - 1 + 1e-9) * mask",
        _select("test_text_decoders", "alone"),
        needs="transformers",
    ),
    Mutant(
        "models_see_held_out_items_in_histories",
        "padkern/data/cold.py",
        "history = _filtered(whole, whole.values < size)",
        "history = whole",
        _select("test_cold", "targets_are_those"),
    ),
    Mutant(
        "added_items_join_the_hottest_bin",
        "padkern/models/growth.py",
        "int(model.item_bins.max()) if unseen_bin is None else unseen_bin",
        "1",
        _select("test_cold", "unseen_item_of_the_catalogue"),
    ),
    Mutant(
        "new_items_keep_the_raise_of_the_old_catalogue",
        "padkern/pad/gate.py",
        "gate.logit[row] = gate.fresh()[row]",
        "gate.logit[row] = gate.logit[row]",
        _select("test_new_items_gate", "fitted_anew"),
    ),
    Mutant(
        "new_items_move_the_whole_gate",
        "padkern/pad/gate.py",
        "gate.logit.grad[others] = 0",
        "gate.logit.grad[others] *= 1",
        _select("test_new_items_gate", "fitted_anew"),
    ),
    Mutant(
        "unseen_items_count_as_rare",
        "padkern/pad/gate.py",
        "read = read[1:] * (train_frequency[1:, None] > 0)",
        "read = read[1:]",
        _select("test_rare_gate", "mostly or knots or far"),
    ),
    Mutant(
        "rare_items_are_raised_whatever_it_costs",
        "padkern/pad/gate.py",
        "floor = gained.max() * (1 - tolerance)",
        "floor = gained.min()",
        _select("test_rare_gate", "far"),
    ),
    Mutant(
        "phases_do_not_say_who_is_rare",
        "padkern/pad/phases.py",
        "held_out(model, self.valid, hidden, self.train_frequency)",
        "held_out(model, self.valid, hidden)",
        _select("test_rare_gate", "who_is_rare"),
    ),
    Mutant(
        "every_item_mixes_the_maps_alike",
        "padkern/models/text_maps.py",
        "gate = logits.softmax(1)",
        "gate = logits.mean(0, keepdim=True).softmax(1).expand(len(x), -1)",
        _select("test_text_maps", "kinds"),
    ),
    Mutant(
        "text_knn_moves_its_mean",
        "padkern/pad/baselines.py",
        "grown._items = torch.cat([self._items, self._placed(text)])",
        "grown._items = torch.cat([self._items, self._placed(text - text.mean(dim=0))])",
        _select("test_cold", "keeps_its_mean"),
    ),
)

MUTANTS = PYTHON + READERS + NATIVE_CORE + RAW_OPS + BATCH_PLAN + ENCODER + EXPERTS
MUTANTS += TRITON + TRITON_HEAD + SEQUENCE + ALIGNMENT + COLD + RIVALS + GRID
