"""What a run needs and no paper describes: processes, sharding, averages, checkpoints, a log.

The scripts import this beside amd.py. Nothing here knows a backbone or a formula of the paper.
Under torchrun every function is called by all ranks, and what one process alone may do, as to write
a file, is done by rank 0.

    device = running.launch()  # one process, or torchrun's
    out = running.open_run("runs/mine", config, resume)  # a folder with config.json
    parts = dict(student=(student, opt_student, ema), fake=(fake, opt_fake, None))
    start = running.load(out, **parts)  # the newest checkpoint's step, 0 at first
    log = running.Log(out, batch=64, start=start)
    for row in amd.train(..., update=running.update, ranks=running.ranks(), start=start):
        ema.update()
        log(row)
        if row["step"] % 100 == 0:
            running.save(out, row["step"], **parts)
    running.draw_log(out)
"""

import argparse
import contextlib
import copy
import json
import math
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import amd

try:
    import fcntl
except ImportError:  # Windows has no such locks, so there two runs in one folder go unnoticed
    fcntl = None


# --------------------------------------------------------------------------------------- processes
def launch() -> torch.device:
    """Join torchrun's process group, if its environment is set -> the device of this process.

    Call it once, before a network is made. ValueError: the environment lacks a part of torchrun's.
    """
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def ranks() -> amd.Ranks:
    """The processes of this run, as amd.train takes them.

    Without a process group it is one process, that of amd.Ranks().
    """
    if not (dist.is_available() and dist.is_initialized()):
        return amd.Ranks()
    return amd.Ranks(dist.get_rank(), dist.get_world_size(), gather)


def gather(v: Tensor) -> Tensor:
    """v (b, ...) of every rank -> (size * b, ...), in order of ranks.

    All must have one shape and one type. It takes part in no graph.
    """
    size = ranks().size
    if size == 1:
        return v
    parts = [torch.empty_like(v, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, v.contiguous())
    return torch.cat(parts)


def update(opts: Sequence[torch.optim.Optimizer], clip: float = 10.0) -> Tensor:
    """amd.update on several ranks, which make one step of the gradients of all.

    Each optimizer's gradients are averaged over ranks and clipped to the norm clip, which counts
    all shards. -> the norms before clipping, (len(opts),) on the CPU. If one of them is not finite,
    no optimizer steps, on any rank.
    """
    average([g for opt in opts for g in amd.gradients(opt)])
    norms = [torch.nn.utils.get_total_norm(amd.gradients(opt)) for opt in opts]
    norms = torch.stack([v.full_tensor() if isinstance(v, DTensor) else v for v in norms]).cpu()
    amd.clip_and_step(opts, norms, clip)
    return norms


def average(grads: list[Tensor]) -> None:
    """Average gradients over ranks, in place.

    Those of networks that FSDP2 shards are averaged already. All others travel as one tensor.
    """
    plain = [g for g in grads if not isinstance(g, DTensor)]
    if ranks().size == 1 or not plain:
        return
    flat = torch.cat([g.flatten() for g in plain]) / ranks().size
    dist.all_reduce(flat)
    parts = flat.split([g.numel() for g in plain])
    torch._foreach_copy_(plain, [part.view_as(g) for part, g in zip(parts, plain, strict=True)])


def seeded(*ints: int) -> torch.Generator:
    """A generator whose draws depend on the integers alone."""
    return torch.Generator().manual_seed(amd.key(*ints))


def progress(items: Iterable | None = None, **options) -> tqdm:
    """A progress bar of tqdm, on rank 0 and on a terminal only.

    items is what to iterate over; without it, call the bar's own update.
    """
    return tqdm(items, leave=False, disable=ranks().rank > 0 or None, **options)


# ---------------------------------------------------------------------------------------- networks
def half(device: torch.device) -> torch.dtype:
    """The type of weights that are not trained: bfloat16 on a GPU, float32 on a CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A context in which new networks are of a type, so that none is in float32 at first."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def visit(device: torch.device, *nets: nn.Module) -> Iterator[None]:
    """A context in which frozen networks compute on a device, and live where they are.

    Copies of their weights go there, in their modules' places, so nothing is copied back.
    """
    places = []
    for module in (module for net in nets for module in net.modules()):
        for tensors in (module._parameters, module._buffers):
            places += [(tensors, name, v) for name, v in tensors.items() if v is not None]
    copies = {}
    try:
        for tensors, name, v in places:
            if v not in copies:  # some weights stand in two places
                copies[v] = v.detach().to(device)
            tensors[name] = copies[v]
        yield
    finally:
        for tensors, name, v in places:
            tensors[name] = v


def autocast(x: Tensor) -> torch.autocast:
    """Compute in bfloat16, if x lies on a GPU.

    It is a context manager, and a decorator too: autocast(x)(net.__call__).
    """
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda)


def shard(
    net: nn.Module,
    blocks: Iterable[nn.Module] = (),
    dtype: torch.dtype | None = torch.bfloat16,
    exact: Iterable[nn.Module] = (),
) -> nn.Module:
    """Give all ranks the weights of rank 0, then shard net by FSDP2, block by block -> net.

    On one process net stays as it is. It computes in dtype (None: as it is stored) and reduces
    gradients in float32; the modules in exact compute as they are stored. Inputs are not cast,
    because t must not become bf16; so the closure that calls net autocasts. Never toggle
    requires_grad later (pytorch#186998). A network that is not sharded must begin alike on all
    ranks.
    """
    if ranks().size == 1:
        return net
    for v in [*net.parameters(), *net.buffers()]:
        dist.broadcast(v.data, 0)
    reduce = None if dtype is None else torch.float32
    policy = MixedPrecisionPolicy(dtype, reduce, cast_forward_inputs=False)
    for module in exact:
        as_stored = MixedPrecisionPolicy(cast_forward_inputs=False)
        fully_shard(module, mp_policy=as_stored, reshard_after_forward=True)
    for module in [*blocks, net]:
        # The root reshards too, else weights that are read after a no-grad rollout are whole bf16.
        fully_shard(module, mp_policy=policy, reshard_after_forward=True)
    return net


def share(net: nn.Module) -> nn.Module:
    """A copy of net over the same storage, so that no weight is held twice.

    Adapters that are added to the copy are not seen by net: a student, a fake teacher and the real
    one are three networks on one frozen base.
    """
    tensors = [*net.parameters(), *net.buffers()]
    return copy.deepcopy(net, {id(v): v for v in tensors})


def adapters(net: nn.Module) -> dict[str, nn.Module]:
    """The layers of net that have a LoRA of peft -> {name: layer}.

    Each has scaling["default"], its scale, and set_scale("default", r), which multiplies it.
    """
    return {name: layer for name, layer in net.named_modules() if hasattr(layer, "set_scale")}


class EMA:
    """The running average of what net trains: decay * average + (1 - decay) * weights.

    decay is in [0, 1), and may be changed in the course of a run. The average is sharded as net is,
    and lies beside it as `shadow`, by the names of the weights.
    """

    def __init__(self, net: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: p for name, p in net.named_parameters() if p.requires_grad}
        self.shadow = {name: p.detach().clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Follow the weights.

        Call it after each student update.
        """
        shadow, weights = [*self.shadow.values()], [*self.weights.values()]
        torch._foreach_lerp_(shadow, weights, 1 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange weights and average, in place.

        Twice makes it undone; `averaged` does so.
        """
        for p, v in zip(self.weights.values(), self.shadow.values(), strict=True):
            kept = p.clone()
            p.copy_(v)
            v.copy_(kept)


@contextlib.contextmanager
def averaged(ema: EMA | None) -> Iterator[None]:
    """A context in which the network has its average for weights, if there is one.

    It is for samples and for the student that is saved in the end.
    """
    if ema:
        ema.swap()
    try:
        yield
    finally:
        if ema:
            ema.swap()


# -------------------------------------------------------------------------------- the run's folder
def write(path: Path, text: str) -> None:
    """Write a text file whole, or not at all.

    It is written beside its place and then renamed.
    """
    beside = path.with_name(f"{path.name}.unfinished")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def read_config(out: Path) -> dict:
    """The config that open_run wrote to a run's folder.

    ValueError: the folder holds no run.
    """
    path = Path(out) / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["config"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is of no run ({error!s:.80}): choose the folder of a run"
        ) from None


def config_of_student(student: Path) -> dict:
    """The config of the run that a student is of: the run's folder, or its `student` and the like.

    It is empty for anyone else's student.
    """
    for folder in (student, student.parent):
        if (folder / "student").exists() and (folder / "config.json").exists():
            return read_config(folder)
    return {}


def is_unfinished(out: Path) -> bool:
    """Is out the folder of a run that has no student yet?"""
    return (out / "checkpoints").exists() and not (out / "student").exists()


FREE = (  # flags that may change when a run goes on, since they change nothing that it learns
    "accum",
    "checkpointing",
    "chunk",
    "compile",
    "log_every",
    "offload_text",
    "out",
    "sample_every",
    "save_every",
)


def open_run(out: str | Path, config: dict, resume: bool = False, free: Iterable[str] = ()) -> Path:
    """Make the folder out and its config.json {config, torch, git}, or find them -> the folder.

    A run that is found goes on if resume is set and its config is the same, but for what free
    names, as the number of steps; the new config is kept then. One that ended before it logged or
    saved anything may be begun anew. Where there is none, a run begins, with or without resume.

    ValueError: a run is found and resume is not set, or its config is another, or another process
    is at work there, or not all ranks see one folder. OSError: it cannot be made.
    """
    out = Path(out)
    path = out / "config.json"
    config = json.loads(json.dumps(config, default=str))
    out.mkdir(parents=True, exist_ok=True)
    if path.exists():
        read_config(out)  # a folder of something else is left as it is
    seen_by_all(out)
    free_folder = lock(out) if ranks().rank == 0 else True
    require(together(free_folder), f"{out} has a run at work now: choose another folder")

    old = read_config(out) if path.exists() else None
    if old is not None and has_results(out):
        require(resume, f"{out} holds a run: add --resume to go on, or choose another folder")
    if old is not None and resume:
        changes = differences(old, config, free)
        require(
            not changes,
            f"{out} holds another run ({changes}): resume it as it was, or choose another folder",
        )

    together(True)  # every rank has read the old config before rank 0 writes the new one
    if ranks().rank == 0:
        git = f"git -C '{Path(__file__).parent}' rev-parse HEAD"
        failed, commit = subprocess.getstatusoutput(git)
        versions = dict(torch=torch.__version__, git=None if failed else commit)
        write(path, json.dumps(dict(config=config) | versions, indent=2))
    return out


def differences(old: dict, new: dict, free: Iterable[str]) -> str:
    """What differs between two configs, but for the keys in free.

    It reads "lr 0.001 -> 0.002, seed 0 -> 1", and is empty where nothing does.
    """
    changes = []
    for k in old | new:
        if k not in free and old.get(k) != new.get(k):
            changes.append(f"{k} {old.get(k)} -> {new.get(k)}")
    return ", ".join(changes)


def has_results(out: Path) -> bool:
    """Has a run saved a checkpoint, a sample or a student, or logged a step?

    The first three lie in folders. A run that has nothing of it may be begun anew.
    """
    log = out / "log.jsonl"
    logged = log.exists() and log.stat().st_size > 0
    return logged or any(path.is_dir() and any(path.iterdir()) for path in out.iterdir())


LOCKS = {}  # the folders in which this process is at work, with their locked files


def unlock() -> None:
    """Let go of the locks in a child, which inherits them, so that they end with the parent."""
    for file in LOCKS.values():
        file.close()
    LOCKS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=unlock)


def lock(out: Path) -> bool:
    """Take a folder for this process -> False if another process has it.

    The lock is the system's, on a file of the folder: it ends with its process, however that ends.
    Where there are no such locks, as on Windows and some network disks, all is free.
    """
    key = out.resolve()
    if fcntl is None or key in LOCKS:
        return True
    file = (out / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return False
    except OSError:  # a disk without locks
        pass
    LOCKS[key] = file
    return True


def together(good: bool) -> bool:
    """Is it so on all ranks?

    All of them wait here for each other, and get the same answer. So they raise together, and none
    is left in a collective call that the others never make.
    """
    return bool(gather(torch.tensor([good])).all())


def seen_by_all(out: Path) -> None:
    """ValueError, on every rank, unless all of them see one folder at out.

    Rank 0 writes a file and the others look for it, for up to 5 seconds; it has a new name each
    time, of which no network disk has a cached opinion.
    """
    token = gather(torch.tensor([secrets.randbits(48)]))[0].item()
    path = out / f"seen_{token:x}"
    if ranks().rank == 0:
        path.touch()
    together(True)
    deadline = time.monotonic() + 5
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    one_folder = together(path.exists())
    if ranks().rank == 0:
        path.unlink()
    require(one_folder, f"{out} is not one folder for all ranks: choose one on a disk they share")


# ------------------------------------------------------------------------------------- checkpoints
Parts = dict[str, tuple[nn.Module, torch.optim.Optimizer, EMA | None]]  # by name


def parameters(opt: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters of an optimizer, in its own order.

    That order is their name in a checkpoint.
    """
    return [p for group in opt.param_groups for p in group["params"]]


def tensors(parts: Parts) -> dict[str, object]:
    """What a checkpoint holds -> {key: tensor, or number of an optimizer's state}.

    Per part these are trained weights and buffers (NAME.net.), the average of the weights
    (NAME.ema.) and the optimizer's state (NAME.opt.).
    """
    flat = {}
    for name, (net, opt, ema) in parts.items():
        for k, v in net.state_dict(keep_vars=True).items():
            if v.requires_grad or type(v) is Tensor:  # trained, or a buffer
                flat[f"{name}.net.{k}"] = v
        if ema:
            flat |= {f"{name}.ema.{k}": v for k, v in ema.shadow.items()}
        for i, p in enumerate(parameters(opt)):
            for k, v in opt.state.get(p, {}).items():
                flat[f"{name}.opt.{i}.{k}"] = v
    return flat


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first.

    Only step_DIGITS counts: a copy such as step_200.good is the user's own.
    """
    folder = Path(out) / "checkpoints"
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("step_"))


def save(out: Path, step: int, keep: int | None = None, **parts) -> None:
    """Write out/checkpoints/step_N of the parts, each (net, optimizer, EMA or None).

    It is written beside its place and then renamed: whole, or not at all. Another one of that step
    is replaced. With keep, only so many checkpoints stay, the newest ones. All ranks write their
    own shards, to one folder. OSError: it cannot be written.
    """
    folder = Path(out) / "checkpoints"
    path, new = folder / f"step_{step}", folder / f"unfinished_{step}"
    try:
        with quiet():
            dcp.save(tensors(parts), checkpoint_id=new)
    except (Exception, dcp.CheckpointException) as error:  # the latter is no Exception
        reason = f"{str(error).splitlines()[-1]:.99}"
        raise OSError(f"{new} cannot be written ({reason}): make room, then resume") from error
    if ranks().rank == 0:
        shutil.rmtree(path, ignore_errors=True)
        new.rename(path)
        if keep:
            for old in checkpoints(out)[:-keep]:
                shutil.rmtree(old)


def load(out: Path, **parts) -> int:
    """Fill the parts from the newest checkpoint of out -> its step, or 0 if there is none.

    There may be more or fewer ranks than there were. Resume only what your own runs wrote, for the
    metadata of a checkpoint is a pickle. ValueError: it is damaged, or has other parts.
    """
    found = checkpoints(out)
    if not found:
        return 0
    for _, opt, _ in parts.values():
        fill_state(opt)
    state = tensors(parts)
    try:
        with quiet():
            saved = dcp.FileSystemReader(found[-1]).read_metadata().state_dict_metadata
            others = unlike(state, saved)
            if not others:
                state = {k: state[k] for k in saved}
                dcp.load(state, checkpoint_id=found[-1])  # in place, but for what is no tensor
    except (Exception, dcp.CheckpointException) as error:
        reason = f"{str(error).splitlines()[0]:.80}"
        raise ValueError(
            f"{found[-1]} cannot be read ({reason}): if it is damaged, remove it to resume from the"
            " one before"
        ) from error
    require(
        not others,
        f"{found[-1]} holds other parts or other networks ({', '.join(others[:3])}): give those"
        " that were saved, or choose another folder",
    )
    for name, (_, opt, _) in parts.items():
        for i, p in enumerate(parameters(opt)):
            own = {k: f"{name}.opt.{i}.{k}" for k in opt.state[p]}
            opt.state[p] = {k: state[at] for k, at in own.items() if at in saved}
    return step_of(found[-1])


def unlike(state: dict, saved: dict) -> list[str]:
    """The names of tensors that one of both lacks, or has in another shape, sorted.

    state is to be filled, saved is the metadata of a checkpoint. Only the optimizer's state of a
    parameter that never had a gradient may be missing there.
    """

    def shapes_differ(k):  # what is no tensor, as the step of an 8-bit optimizer, has no shape
        return getattr(saved[k], "size", None) != getattr(state[k], "shape", None)

    missing = {k for k in state.keys() - saved.keys() if ".opt." not in k}
    surplus = saved.keys() - state.keys()
    reshaped = {k for k in state.keys() & saved.keys() if shapes_differ(k)}
    return sorted(missing | surplus | reshaped)


def fill_state(opt: torch.optim.Optimizer) -> None:
    """Make the state of a fresh optimizer, for a checkpoint to be loaded into.

    It takes a step with no gradient, and the load overwrites what that did.
    """
    for p in parameters(opt):
        p.grad = torch.zeros_like(p)
    opt.step()
    opt.zero_grad()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context without torch's warning that one process saves for itself.

    That is what a run on one process wants.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


class Log:
    """Appends a row to out/log.jsonl at each call.

    A resumed run starts at the step `start`; rows of later steps are dropped, for it writes them
    again. batch is the number of samples of a student update, over all ranks. A row reads

        {"step": 10, "fake_step": 50, "reward": 0.31, ..., "sec": 1.7, "samples_per_s": 75.2}

    and what is not finite is null in it.
    """

    def __init__(self, out: Path, batch: int, start: int = 0):
        self.path, self.batch = Path(out) / "log.jsonl", batch
        self.step, self.time = start, time.perf_counter()
        rows = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        whole = [row for row in rows if row.endswith("\n")]  # kill -9 may have cut the last one
        if ranks().rank == 0:
            write(self.path, "".join(row for row in whole if json.loads(row)["step"] <= start))

    def __call__(self, log: dict) -> dict:
        """A dict of amd.train, on all ranks -> the row that rank 0 writes.

        Its numbers are means over ranks; sec (seconds an update since the row before),
        samples_per_s and mem_gib (this rank's peak of GPU memory) are added.
        """
        now = time.perf_counter()
        sec = (now - self.time) / (log["step"] - self.step)
        self.step, self.time = log["step"], now
        values = torch.tensor([[float(v) for v in log.values()]], dtype=torch.float64)
        means = gather(values).mean(0).tolist()
        row = {k: int(v) if isinstance(log[k], int) else v for k, v in zip(log, means, strict=True)}
        row |= dict(sec=sec, samples_per_s=self.batch / sec, mem_gib=peak_gib())
        if ranks().rank == 0:
            with self.path.open("a") as file:
                told = {k: v if math.isfinite(v) else None for k, v in row.items()}
                file.write(json.dumps(told) + "\n")
        return row


def draw_log(out: Path) -> None:
    """Draw out/log.jsonl to out/curves.png: losses, reward and norms against student updates.

    Rank 0 does it, and nothing is drawn of an empty log. A student of several steps has a line for
    the reward of each exit.
    """
    rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    if ranks().rank > 0 or not rows:
        return
    from matplotlib.figure import Figure

    figure = Figure((12, 3.2), layout="constrained", dpi=110)
    panels = figure.subplots(1, 3)
    names = list(dict.fromkeys(k for row in rows for k in row))  # in order, each once
    for ax, title, shown in (
        (panels[0], "loss", [k for k in names if k.startswith("loss_")]),
        (panels[1], "reward", [k for k in names if re.fullmatch(r"reward(_exit_\d+)?", k)]),
        (panels[2], "norm", [k for k in names if k.endswith("_norm")]),
    ):
        for k in shown:
            points = [(row["step"], row[k]) for row in rows if row.get(k) is not None]
            if points:
                ax.plot(*zip(*points, strict=True), marker=".", lw=1, label=k)
                ax.legend(fontsize=7)
        ax.set(title=title, xlabel="student updates")
    panels[2].set_yscale("log")
    figure.savefig(Path(out) / "curves.png")


def peak_gib() -> float:
    """The most GPU memory that this process had allocated at a time, in GiB.

    NaN without a GPU.
    """
    if not torch.cuda.is_available():
        return math.nan
    return torch.cuda.max_memory_allocated() / 2**30


# ------------------------------------------------------------------------------- many small jobs
DONE = None  # a count of steps that the worker processes share


class Workers:
    """Processes that do one job after the other: as many as there are cores, or count.

    Each has one thread, for the networks are small. Make it before anything is computed, since the
    processes begin as they find this one. With count = 0 this process does the jobs itself, which
    is for a GPU.
    """

    def __init__(self, count: int | None = None):
        self.pool = None
        if count == 0:
            return
        # A fork starts at once, where it is safe; elsewhere each worker imports torch again.
        fork = sys.platform == "linux" and not torch.cuda.is_available()
        context = multiprocessing.get_context("fork" if fork else "spawn")
        self.done = context.Value("l", 0)
        self.pool = futures.ProcessPoolExecutor(count or cores(), context, begin, (self.done,))
        self.pool.submit(int).result()  # the forks are made now, and not with the first job

    def map(self, work: Callable, jobs: Sequence, what: str) -> list:
        """work(job) for each job -> results, in order.

        A job has `steps`, their number; work counts them by tick, for the progress bar. An error of
        a job is raised when all have ended. OSError: a process was killed; there are no workers
        any more.
        """
        if self.pool is None:
            return [work(job) for job in progress(jobs, desc=what)]
        self.done.value = 0
        total = sum(job.steps for job in jobs)
        try:
            results = [self.pool.submit(work, job) for job in jobs]
            with tqdm(total=total, desc=what, leave=False, disable=None) as bar:
                while futures.wait(results, 0.2).not_done:
                    bar.update(min(self.done.value, total) - bar.n)
            return [result.result() for result in results]
        except futures.BrokenExecutor:
            raise OSError(f"{what}: a process was killed; is there too little memory?") from None
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.kill()  # or this process would wait for their jobs before it ends
            raise


def begin(done) -> None:
    """What a worker does first."""
    global DONE
    DONE = done
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers


def tick(i: int) -> None:
    """Tell the progress bar that step i is done, if this is a worker; now and then is enough."""
    if DONE is not None and i % 20 == 0:
        with DONE.get_lock():
            DONE.value += 20


def cores() -> int:
    """The cores that this process may use.

    In a container, or under a scheduler, they may be fewer than the machine has.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def mean_std(rows: list[dict]) -> dict:
    """Numbers, a dict a seed -> [mean, std] of each; of a single seed the numbers themselves."""
    if len(rows) == 1:
        return rows[0]
    columns = {k: torch.tensor([row[k] for row in rows], dtype=torch.float64) for k in rows[0]}
    return {k: [v.mean().item(), v.std().item()] for k, v in columns.items()}


def interval(values: Sequence[float]) -> list[float]:
    """The mean of numbers, one a seed, and half the width of its 95 % interval by Student's t.

    A single number has no interval: its half width is NaN.
    """
    from scipy.stats import t as student_t

    v = torch.tensor(values, dtype=torch.float64)
    if len(v) == 1:
        return [v.item(), math.nan]
    half = student_t.ppf(0.975, len(v) - 1).item() * v.std().item() / len(v) ** 0.5
    return [v.mean().item(), half]


def compared(rows: list[dict], others: list[dict]) -> dict[str, list[float]]:
    """How numbers differ from others, seed by seed -> the interval of each difference."""
    return {k: interval([a[k] - b[k] for a, b in zip(rows, others, strict=True)]) for k in rows[0]}


def draw_differences(panels: Sequence, differences: dict[str, dict], measures: Sequence) -> None:
    """A panel for each measure: the differences of each arm, with their intervals."""
    at = range(len(differences), 0, -1)
    for ax, measure in zip(panels, measures, strict=True):
        mean, half = zip(*(row[measure] for row in differences.values()), strict=True)
        ax.errorbar(mean, at, xerr=half, fmt="o", ms=3, capsize=3)
        ax.axvline(0, color="grey", lw=0.8)
        ax.set(title=f"{measure}: difference", yticks=[])
        ax.locator_params(axis="x", nbins=5)
    panels[0].set_yticks(at, [*differences], fontsize=7)


def show(arms: dict[str, dict]) -> None:
    """Print a table: an arm a row, a measure a column.

    Where there are several seeds, it has mean +- standard deviation.
    """
    keys = list(next(iter(arms.values())))
    width = max(map(len, arms)) + 1
    print(" " * width + "".join(f"{k:>18}" for k in keys))
    for name, row in arms.items():
        line = f"{name:{width}}"
        for k in keys:
            values = row[k] if isinstance(row[k], list) else [row[k]]
            line += f"{' +- '.join(f'{v:.3f}' for v in values):>18}"
        print(line)


# ------------------------------------------------------------------------------------ command line
GROUPS = ("method", "optimisation", "data", "output", "sampling")
FLAGS = {  # name: group, type, help; a type of bool is --name / --no-name
    "method": ("method", str, "the row of amd.METHODS"),
    "s": ("method", float, "sensitivity s of Eq. 13 in [0, 1]; 0 = no score adaptation"),
    "tau": ("method", float, "temperature of W(a) = exp(-a / tau); inf = no sharpening"),
    "lam": (
        "method",
        float,
        "weight of the external force F_ext of Eq. 6, which dmd2 and dmdr have",
    ),
    "w": ("method", float, "CFG scale of the real teacher; 1 = no guidance"),
    "group": ("method", int, "K, the samples of one condition whose rewards are compared, Eq. 12"),
    "student-steps": ("method", int, "steps in which the student generates"),
    "exit-aware": (
        "method",
        bool,
        "tell the fake teacher at which of the student's steps a sample was made",
    ),
    "fake-steps": ("method", int, "fake updates for each student update"),
    "batch": ("optimisation", int, "samples of an update, over all ranks"),
    "accum": (
        "optimisation",
        int,
        "micro-batches of an update on each rank; more of them need less memory",
    ),
    "steps": ("optimisation", int, "student updates"),
    "lr": ("optimisation", float, "learning rate of the student"),
    "fake-lr": ("optimisation", float, "learning rate of the fake teacher"),
    "ema": ("optimisation", float, "decay of the student's running average, in [0, 1); 0 = none"),
    "lora-rank": ("optimisation", int, "train LoRAs of this rank; 0 = whole networks"),
    "adam8bit": (
        "optimisation",
        "on",
        "keep the states of AdamW in 8 bits, for LoRAs or on one process",
    ),
    "checkpointing": (
        "optimisation",
        bool,
        "recompute activations in the backward pass instead of keeping them",
    ),
    "compile": (
        "optimisation",
        bool,
        "compile the repeated blocks of the networks; by default on a GPU only",
    ),
    "offload-text": (
        "optimisation",
        "on",
        "keep the text encoders on the CPU while they are not needed",
    ),
    "seed": ("optimisation", int, "seed of all draws"),
    "dry-run": (
        "data",
        str,
        "random weights: tiny for a test on a CPU, full to measure speed and memory",
    ),
    "init": ("data", Path, "a run to start from"),
    "prompts": ("data", Path, "file of prompts"),
    "out": ("output", Path, "folder of the run"),
    "resume": ("output", "on", "go on with the run in --out"),
    "log-every": ("output", int, "updates between rows of log.jsonl"),
    "sample-every": ("output", int, "updates between samples"),
    "save-every": ("output", int, "updates between checkpoints"),
    "chunk": ("sampling", int, "samples that are made at a time"),
    "samples": ("sampling", Path, "what to score"),
    "layout": ("sampling", str, "which benchmark's names of files to use"),
}


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one line and with the flags that all scripts share.

    --help shows them in groups: method, optimisation, data, output, sampling. A script adds flags
    of its own to a group:

        parser = running.Parser(__doc__)
        parser.shared("w", "DMD2's 8", default=8.0)
        parser.groups["data"].add_argument("--teacher", type=Path, help="file of its weights")
        running.run(main, parser.parse_args)
    """

    def __init__(self, doc: str, groups: Iterable[str] = GROUPS):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.groups = {name: self.add_argument_group(name) for name in groups}

    def error(self, message: str) -> None:
        """Say what is wrong in one line, without the usage, and exit with code 2."""
        self.exit(2, f"{self.prog}: {message}\n")

    def shared(self, name: str, note: str = "", **options) -> None:
        """Add the flag --name of FLAGS.

        note says what the default is and where it comes from; options go to add_argument.
        """
        group, kind, text = FLAGS[name]
        if kind == "on":
            options["action"] = "store_true"
        elif kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = kind
        text = f"{text} ({note})" if note else text
        self.groups[group].add_argument(f"--{name}", help=text, **options)


def fill(args: argparse.Namespace, defaults: dict) -> argparse.Namespace:
    """Give the flags that were not given, and are None, a default -> args.

    It is for defaults that hang on other flags, as those of a dry run do.
    """
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def micro_batches(batch: int, most: int) -> int:
    """The fewest --accum by which micro-batches of this rank have at most `most` samples.

    What makes no sense, as a batch of 0 or one that the ranks do not divide, scripts refuse later.
    """
    of_rank = -(-batch // int(os.environ.get("WORLD_SIZE", 1)))
    counts = range(1, of_rank + 1)
    return next((n for n in counts if of_rank % n == 0 and of_rank // n <= most), 1)


def positive(args: argparse.Namespace, *names: str) -> None:
    """ValueError, unless each of these flags is a finite number above 0."""
    for name in names:
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        require(0 < value < math.inf, f"{flag} {value}: choose it above 0")


def require(condition: object, fix: str) -> None:
    """Check an input: ValueError, unless the condition holds.

    fix says what is wrong and what to do, as in "choose --batch as a multiple of --group". Scripts
    check all that they can before anything is written or downloaded.
    """
    if not condition:
        raise ValueError(fix)


def run(main: Callable, parse: Callable, hint: str = "") -> None:
    """main(parse()), where a bad input ends in one line on stderr and exit code 2.

    hint says what to do if the GPU has too little memory. Ctrl-C ends in one line and code 130.
    """
    name = Path(sys.argv[0]).name
    try:
        main(parse())
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        fix = f"; {hint}" if hint and isinstance(error, torch.OutOfMemoryError) else ""
        print(f"{name}: {' '.join(str(error).split()):.500}{fix}", file=sys.stderr)
        sys.exit(2)
    if ranks().size > 1:  # all is written, and gloo now and then aborts the interpreter's teardown
        sys.stdout.flush()
        os._exit(0)


# ------------------------------------------------------------------------------------ speed report
class Clock:
    """Measures calls one by one.

    It says what each took as soon as it is known, for a long report may be cut short.
    """

    def __init__(self):
        self.seconds = {}

    def __call__(self, name: str, call: Callable[[], object]) -> float:
        """Seconds of one call, after one to warm up."""
        call()
        wait()
        begun = time.perf_counter()
        call()
        wait()
        self.seconds[name] = time.perf_counter() - begun
        say(f"{name}: {self.seconds[name]:.4f} s")
        return self.seconds[name]

    def ratio(self, name: str, took: float, needs: dict[str, int]) -> None:
        """Say what an update took beside the calls that it needs.

        needs has their number, by the name under which they were measured.
        """
        bare = sum(self.seconds[part] * times for part, times in needs.items())
        calls = ", ".join(f"{times} {part}" for part, times in needs.items())
        say(f"{name}: {took:.4f} s; bare calls ({calls}): {bare:.4f} s; ratio {took / bare:.3f}")


def wait() -> None:
    """Wait until the GPU has done what it was told; without a GPU there is nothing to wait for.

    Python runs ahead of the GPU, so a time that is taken without it says little.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def say(text: str) -> None:
    """Print on rank 0, at once."""
    if ranks().rank == 0:
        print(text, flush=True)
