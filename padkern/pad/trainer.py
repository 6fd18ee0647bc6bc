"""The training loop that every phase shares: epochs, schedule, early stopping, exact resume.

All randomness of an epoch derives from (seed, phase, epoch), the dropout masks of the encoders from
(seed, phase, step), so a phase that was killed and resumed at an epoch boundary gives the same bits
as one that was not; on the CPU SASRec's steps have the same bits for any number of threads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from padkern.data.plan import BatchPlan, TrainBatches
from padkern.data.random_streams import stream_seed
from padkern.errors import PadkernError
from padkern.modules import FrequencyGate
from padkern.pad.config import PhaseConfig
from padkern.pad.folder import RunFolder
from padkern.pad.progress import Reporter


@dataclass
class FitResult:
    """What a phase leaves behind besides the model's weights."""

    history: list[dict] = field(default_factory=list)
    best_epoch: int = -1
    best: float = -math.inf
    seconds: float = 0.0


def parameter_groups(model: nn.Module, config: PhaseConfig, gate_lr: float | None) -> list[dict]:
    """AdamW groups: decay on matrices only, none on gates, norms, biases and scalars.

    Args:
        model: the model to train.
        config: learning rate and weight decay.
        gate_lr: learning rate of gate tables, default that of the phase; 0 freezes them.
    """
    gates = {id(p) for m in model.modules() if isinstance(m, FrequencyGate) for p in m.parameters()}
    decay, plain, gate = [], [], []
    for p in model.parameters():
        if not p.requires_grad:
            continue
        if id(p) in gates:
            gate.append(p)
        elif p.ndim >= 2:
            decay.append(p)
        else:
            plain.append(p)
    groups = [
        {"params": decay, "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": plain, "lr": config.lr, "weight_decay": config.norm_weight_decay},
    ]
    if gate:
        lr = config.lr if gate_lr is None else gate_lr
        groups.append({"params": gate, "lr": lr, "weight_decay": config.gate_weight_decay})
    return [g for g in groups if g["params"]]


def schedule(step: int, total: int, warmup: int, floor: float) -> float:
    """Learning-rate factor: linear warm-up, then a cosine from 1 to ``floor``."""
    cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(step / max(total, 1), 1.0)))
    return min(1.0, (step + 1) / warmup) * cosine if warmup else cosine


def fit(
    model: nn.Module,
    batches: TrainBatches,
    loss_fn: Callable[[BatchPlan, int], Tensor],
    validate: Callable[[], dict[str, float]],
    config: PhaseConfig,
    *,
    phase: str,
    seed: int,
    section: str | None = None,
    gate_lr: float | None = None,
    keep_start: bool = False,
    reporter: Reporter | None = None,
    folder: RunFolder | None = None,
    resume: bool = False,
) -> FitResult:
    """Trains ``model`` and leaves the weights of its best validation epoch in it.

    Args:
        model: modified in place.
        batches: shuffled batches, see :class:`TrainBatches`.
        loss_fn: batch and global step to scalar loss.
        validate: metrics on the validation split; selection reads ``config.select``.
        config: epochs, learning rate, decay, patience.
        phase: name, part of every random stream and of the checkpoint path.
        seed: root of the random streams.
        section: of the configuration, named in messages; default the phase.
        gate_lr: learning rate of gate tables.
        keep_start: the weights before the first epoch count as an epoch (0) that may be the best.
        reporter: progress, default none.
        folder: run folder for epoch records and the checkpoint; ``None`` keeps nothing.
        resume: continue from the folder's checkpoint of this phase if there is one.

    Returns:
        The epoch records and the best epoch.

    Raises:
        PadkernError: the loss is not finite (names phase, epoch and step).
    """
    reporter = reporter or Reporter()
    result = FitResult()
    optimizer = torch.optim.AdamW(parameter_groups(model, config, gate_lr))
    base = [group["lr"] for group in optimizer.param_groups]
    best: dict[str, Tensor] = {}
    stale, start = 0, 0
    where = f"checkpoints/{phase}"
    if folder is not None and resume and folder.has(where):
        start, stale, best = _restore(folder, where, model, optimizer, result)
    if folder is not None and resume:
        _drop_unsaved_records(folder, phase, len(result.history))
    total = config.epochs * len(batches)
    reporter.start_phase(phase, config.epochs, len(batches))
    if keep_start and start == 0:
        model.eval()
        result.best = validate()[config.select]
        best = {name: value.clone() for name, value in model.state_dict().items()}
    finished = start >= config.epochs or stale >= config.patience > 0
    for epoch in range(start, 0 if finished else config.epochs):
        torch.manual_seed(stream_seed(seed, phase, "epoch", epoch))
        model.train()
        began = time.perf_counter()
        loss_sum, users, tokens = 0.0, 0, 0
        for number, batch in enumerate(batches.epoch(epoch)):
            step = epoch * len(batches) + number
            factor = schedule(step, total, config.warmup_steps, config.min_lr_factor)
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * factor
            loss = loss_fn(batch, step)
            value = loss.item()
            if not math.isfinite(value):
                raise PadkernError(
                    f"phase {phase}, epoch {epoch + 1}, step {step}: the loss is {value}; "
                    f"lower {section or phase}.lr (now {config.lr})"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if config.clip_norm:
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            loss_sum += value
            users += len(batch.users)
            tokens += batch.targets.numel()
            reporter.step(value, len(batch.users), batch.targets.numel())
        seconds = time.perf_counter() - began
        model.eval()
        metrics = validate()
        better = metrics[config.select] > result.best
        if better:
            result.best, result.best_epoch, stale = metrics[config.select], epoch, 0
            best = {name: value.clone() for name, value in model.state_dict().items()}
        else:
            stale += 1
        record = {
            "phase": phase,
            "epoch": epoch + 1,
            "loss": loss_sum / max(len(batches), 1),
            **metrics,
            "seconds": seconds,
            "users_per_s": users / max(seconds, 1e-9),
            "tokens_per_s": tokens / max(seconds, 1e-9),
            "best": better,
        }
        result.seconds += time.perf_counter() - began
        result.history.append(record)
        stop = config.patience > 0 and stale >= config.patience
        if folder is not None:
            folder.append_jsonl("metrics.jsonl", record)
            _save(folder, where, model, optimizer, best, result, stale)
        reporter.end_epoch(record)
        if stop or reporter.wants_stop():
            break
    if config.restore_best and best:
        model.load_state_dict(best)
    model.eval()
    reporter.end_phase(phase, {"best_epoch": result.best_epoch + 1, "best": result.best})
    return result


def _drop_unsaved_records(folder: RunFolder, phase: str, saved: int) -> None:
    """Removes epoch records of ``phase`` beyond the saved ones: a kill can fall between the two."""
    records = folder.read_jsonl("metrics.jsonl")
    first = next((i for i, r in enumerate(records) if r["phase"] == phase), len(records))
    if len(records) > first + saved:
        folder.truncate_jsonl("metrics.jsonl", first + saved)


def _save(
    folder: RunFolder,
    where: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    best: dict[str, Tensor],
    result: FitResult,
    stale: int,
) -> None:
    tensors = {f"model/{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"best/{k}": v for k, v in best.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{k}": v for k, v in state.items()}
    meta = {
        "history": result.history,
        "best_epoch": result.best_epoch,
        "best": result.best,
        "seconds": result.seconds,
        "stale": stale,
    }
    folder.save_tensors(where, {k: v.detach().contiguous() for k, v in tensors.items()}, meta)


def _restore(
    folder: RunFolder,
    where: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    result: FitResult,
) -> tuple[int, int, dict[str, Tensor]]:
    tensors, meta = folder.load_tensors(where)

    def part(prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

    model.load_state_dict(part("model/"))
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in part("optimizer/").items():
        index, key = name.split("/")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    result.history = list(meta["history"])
    result.best_epoch, result.best = meta["best_epoch"], meta["best"]
    result.seconds = meta["seconds"]
    return len(result.history), meta["stale"], part("best/")
