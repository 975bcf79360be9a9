"""``sleeplib gpu-check``: whether all of this works on a GPU, how fast it is there, and what fits.

In about ten minutes it compares the backends that run there and a captured step with what they must equal,
runs the tests that need a GPU, and measures a step of each quick and small preset: its time, and its peak
memory beside the predicted one.
"""

import gc
import json
import math
import platform
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path

import torch

from . import device as machine
from . import experiments, records
from .bench import in_turn
from .checks import finite_number
from .flops import fitting_parts, training_bytes
from .kernels import gated_delta_rule, gated_hebbian_rule, use_numba
from .training import Trainer, training_batch

GIB = 2**30
SHAPES = ((2, 70, 2, 16, 32), (1, 130, 2, 64, 128))  # B, T, H, K, V: with a remainder; over several chunks
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2}  # as in the tests
COLUMNS = "preset N precision how parts ms tokens/s GiB predicted ratio note".split()
TESTS_SHARE = 0.4  # of the time, at most


def gpu_check(device="cuda", out="gpu-check.json", minutes=10, say=print):
    """Check and measure a GPU, print a table and write one JSON file.

    Parameters
    ----------
    device : str
        "cuda", or one CUDA device.  "cpu" is a dry run: the same at a small shape, with nothing captured.
    out : path_like
        The file.  After every part it is written again as a whole, so an interrupted check leaves what it has
        found so far.
    minutes : float
        Nothing new is begun after so many; what was left out is printed, and listed under "not done".
    say : callable
        Gets each line.

    Returns
    -------
    dict
        What was written: ``machine``, ``versions``, ``commit``, ``dirty``, ``backends``, ``captured``,
        ``tests``, ``presets``, ``not done``, ``wrong`` (what is not as it must be), ``minutes``, ``seconds``
        and ``status``.

    Raises
    ------
    ValueError, OSError
        If there is no such device, `minutes` is not a number of at least 0, or `out` cannot be written.

    Chapter: 10_training
    """
    try:
        device = machine.find_device(device)
    except ValueError as error:
        raise ValueError(f"{error}; --device cpu makes a dry run without a GPU") from None
    minutes, out = finite_number("minutes", minutes, least=0), Path(out)
    if out.is_dir():
        raise OSError(f"out must be a file; {out} is a folder")
    records.check_writable("out", out.parent)
    check = _Check(device, out, minutes, say)
    try:
        check.everything()
        check.report["status"] = "done"
    except KeyboardInterrupt:
        check.report["status"] = "interrupted"
        raise
    finally:
        check.save()
    say(f"written: {out}")
    return check.report


class _Check:
    """One check: its device, its time, what it has found."""

    def __init__(self, device, out, minutes, say):
        self.device, self.out, self.say = device, out, say
        self.dry = device.type == "cpu"
        self.began, self.seconds, self.longest = time.perf_counter(), 60 * minutes, {}
        commit, dirty = records.commit()
        self.report = dict(machine=describe(device), versions=records.versions(), commit=commit, dirty=dirty)
        self.report |= {"backends": [], "captured": None, "tests": None, "presets": [], "not done": []}
        self.report |= {"wrong": [], "minutes": minutes, "seconds": 0.0, "status": "broken off"}

    def left(self):
        """Seconds that are left."""
        return self.seconds - self.passed()

    def passed(self):
        """Seconds that have passed."""
        return time.perf_counter() - self.began

    def save(self):
        """Write the file as it stands."""
        self.report["seconds"] = round(self.passed(), 1)
        records.write_atomically(
            self.out, (json.dumps(self.report, indent=1, allow_nan=False) + "\n").encode()
        )

    def part(self, what, kind, function, *args):
        """Call a function and save, unless time is up or too short for one more part of this kind."""
        if self.left() <= self.longest.get(kind, 0):
            self.report["not done"].append(what)
            self.say(f"not done, the time is over: {what}")
            return
        began = time.perf_counter()
        try:
            function(*args)
        except Exception as error:  # the other parts may still say something
            self.demand(False, f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        self.longest[kind] = max(self.longest.get(kind, 0), time.perf_counter() - began)
        self.save()

    def demand(self, good, what):
        """Note a fault unless `good`."""
        if not good:
            self.report["wrong"].append(what)
            self.say(f"WRONG: {what}")

    def everything(self):
        """All parts, the short ones first."""
        for key, value in self.report["machine"].items():
            self.say(f"{key:12} {value}")
        for backend in ("reference", "chunked", "fla"):
            self.part(f"backend {backend}", "backend", self.backend, backend)
        self.part("a captured step", "captured step", self.captured)
        self.part("pytest -m cuda", "tests", self.tests)
        todo = list(self.todo())
        for e, passes, how in todo:
            self.part(f"{e.name} N={passes} {how}", f"{how} {e.name}", self.preset, e, passes, how)
        for line in table(self.report["presets"]):
            self.say(line)
        said = {key: len(self.report[key]) for key in ("wrong", "not done")}
        self.say(", ".join(f"{count} {key}" for key, count in said.items()))

    def todo(self):
        """Yield experiment, N and how for every step to be measured, those that need no compiler first."""
        if self.dry:
            small = experiments.get("rule110-quick").replace({"train.batch": 4, "model.pattern": "ag"})
            yield from ((small, passes, "eager") for passes in (1, 2))
            return
        names = [n for scale in ("quick", "small") for n in experiments.PRESETS if n.endswith(f"-{scale}")]
        chosen = [experiments.get(name) for name in names]
        for how in ("eager", "captured"):
            for e in chosen:
                if how == "eager" or e.train.graph:
                    yield from ((e, passes, how) for passes in e.passes)

    def backend(self, backend):
        """Compare a backend on the device with the reference on the CPU: outputs, state, every gradient."""
        dtypes = (torch.bfloat16,) if backend == "fla" else (torch.float32, torch.float64)
        if backend == "fla" and (self.dry or find_spec("fla") is None):
            why = "runs on CUDA only" if self.dry else "is not installed"
            self.report["backends"].append(dict(backend=backend, skipped=f"fla {why}"))
            self.say(f"backend {backend}: skipped, it {why}")
            return
        for rule in (gated_delta_rule, gated_hebbian_rule):
            for shape in SHAPES[: 1 if self.dry else None]:
                truth = _run(rule, shape, "cpu", torch.float64, "reference")
                for dtype in dtypes:
                    found = _run(rule, shape, self.device, dtype, backend)
                    worst, error = _worst(found, truth)
                    row = dict(backend=backend, rule=rule.__name__, shape=shape, dtype=str(dtype)[6:])
                    self.report["backends"].append(row | dict(worst=worst, error=error))
                    where = f"{backend}, {rule.__name__}, {row['dtype']}, T = {shape[1]}"
                    self.demand(error <= TOLERANCE[dtype], f"{where}: {worst} is off by {error:.2g}")
        errors = [row["error"] for row in self.report["backends"] if row["backend"] == backend]
        self.say(f"backend {backend} against the reference: off by at most {max(errors):.1g}")

    def captured(self):
        """Compare a captured step with one that is not: loss and every gradient."""
        e = experiments.get("rule110-quick").replace({"train.batch": 8, "train.precision": "float32"})
        batch, found = training_batch(e.task, e.train, 0, 0), []
        for graph in (False, True):
            trainer = Trainer(e.replace({"train.graph": graph}), 2, 0, self.device, 1)
            loss = trainer.forward_backward(batch)
            grads = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
            found.append({"loss": loss} | grads)
        worst, error = _worst(found[1], found[0])
        fused = not self.dry and find_spec("triton") is not None
        self.report["captured"] = dict(worst=worst, error=error, captured=not self.dry, fused=fused)
        self.demand(error <= TOLERANCE[torch.float32], f"a captured step: {worst} is off by {error:.2g}")
        what = (
            "nothing is captured on a CPU: two plain steps" if self.dry else "a captured step and a plain one"
        )
        self.say(
            f"{what} differ by {error:.1g}{'' if fused or self.dry else ', nothing was fused: no Triton'}"
        )

    def tests(self):
        """Run the tests that need a GPU, where there are tests."""
        root, limit = records.checkout(), min(TESTS_SHARE * self.seconds, self.left())
        why = "a dry run" if self.dry else "sleeplib is installed, not a checkout" if root is None else None
        if why := why or ("pytest is not installed" if find_spec("pytest") is None else None):
            self.report["tests"] = f"not run: {why}"
        else:
            command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "tests"]
            try:
                done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=limit)
                lines = (done.stdout + done.stderr).strip().splitlines() or ["nothing said"]
                failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
                self.report["tests"] = dict(code=done.returncode, summary=lines[-1], failed=failed)
                self.demand(done.returncode == 0, f"pytest -m cuda: {'; '.join([lines[-1], *failed])}")
            except subprocess.TimeoutExpired:
                self.report["tests"] = f"broken off after {limit:.0f} s"
                self.report["not done"].append("pytest -m cuda")
        found = self.report["tests"]
        self.say(f"pytest -m cuda: {found if isinstance(found, str) else found['summary']}")

    def preset(self, experiment, passes, how):
        """Measure a step with the whole batch or, where that does not fit, in as many parts as do."""
        e = experiment.replace({"train.graph": how == "captured"})
        low = e.train.precision == "bfloat16" and machine.multiplies_bfloat16(self.device)
        precision, batch = "bfloat16" if low else "float32", e.train.batch
        row = dict(preset=e.name, passes=passes, precision=precision, how=how, batch=batch, parts=1)
        row |= dict(
            predicted_bytes=training_bytes(e, passes, batch, precision), seconds=None, peak_bytes=None
        )
        row |= dict(note="")
        while True:
            error = self.measure(e, passes, row)
            if error is None:
                break
            if "out of memory" not in error.lower():
                row["note"] = f"failed: {error}"
                self.demand(False, f"{e.name} N={passes} {how}: {row['note']}")
                break
            row["parts"] = self.more_parts(e, passes, row)
            row["note"] = "does not fit"
            if row["parts"] > batch:
                row["parts"] = batch
                break
            if how == "captured":  # parts are not captured; the eager row says whether they fit
                row["note"] += f", {row['parts']} parts would"
                break
            row["note"] += f", in {row['parts']} parts it does"
            row["predicted_bytes"] = training_bytes(e, passes, -(-batch // row["parts"]), precision)
        self.report["presets"].append(row)
        self.say(" ".join(f"{name} {value}" for name, value in zip(COLUMNS, _cells(row)) if value))

    def more_parts(self, e, passes, row):
        """Twice the number of parts that did not fit, or what the prediction says, if that is more."""
        self.let_go()
        free = math.inf if self.dry else machine.free_bytes(self.device)
        plain = e.replace({"train.graph": False})
        wanted = fitting_parts(plain, passes, free, row["precision"]) or 2 * row["batch"]
        return max(2 * row["parts"], wanted)

    def let_go(self):
        """Free what trainers and errors before this hold on the GPU; forget what was compiled for them."""
        gc.collect()
        if not self.dry:
            torch._dynamo.reset()  # else the blocks of all presets would share one limit on recompilations
            torch.cuda.empty_cache()

    def measure(self, e, passes, row):
        """Fill in seconds and peak bytes of a step; return in one line what stopped it, or None."""
        cuda = not self.dry
        self.let_go()
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            trainer = Trainer(e, passes, 0, self.device, row["parts"])
            batch = training_batch(e.task, e.train, 0, 0)
            trainer.next_batch = lambda: batch  # drawing is no part of this
            with torch.cuda.device(self.device) if cuda else nullcontext():
                (row["seconds"],) = in_turn([trainer.train_step], 3)
            row["peak_bytes"] = torch.cuda.max_memory_allocated(self.device) if cuda else None
            finite = bool(trainer.losses.isfinite().all())
            return None if finite else "the loss is not finite"
        except RuntimeError as error:  # out of memory, or what a driver or compiler says
            chain = [error]
            while (
                chain[-1].__context__ is not None
            ):  # a capture that runs out of memory ends in another error
                chain.append(chain[-1].__context__)
            return " ".join(" from ".join(f"{type(e).__name__}: {e}"[:200] for e in chain).split())


def describe(device):
    """What a device is: name, capability, memory, driver, versions."""
    if device.type == "cpu":
        return dict(name=records.processor(), torch=torch.__version__, note="a dry run on the CPU")
    of, driver = torch.cuda.get_device_properties(device), None
    with suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
        driver = said.split()[0] if said.split() else None
    found = dict(name=of.name, capability=f"{of.major}.{of.minor}", memory=f"{of.total_memory / GIB:.1f} GiB")
    found |= dict(free=f"{machine.free_bytes(device) / GIB:.1f} GiB", driver=driver)
    found |= dict(torch=torch.__version__, cuda=torch.version.cuda, system=platform.platform())
    names = ("triton", "fla")
    found |= {name: "found" if find_spec(name) is not None else "not installed" for name in names}
    return found | dict(bfloat16="yes" if machine.multiplies_bfloat16(device) else "no, float32 instead")


def table(rows):
    """Lines of a table of measured steps."""
    cells = [COLUMNS, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]


def _cells(row):
    e, known = experiments.get(row["preset"]), row["seconds"] is not None
    speed = (
        [f"{row['seconds'] * 1e3:.1f}", f"{row['batch'] * e.task.length / row['seconds']:,.0f}"]
        if known
        else ["", ""]
    )
    peak, predicted = row["peak_bytes"], row["predicted_bytes"]
    memory = [f"{peak / GIB:.3g}" if peak else "", f"{predicted / GIB:.3g}"]
    memory += [f"{peak / predicted:.2f}" if peak else "", row["note"]]
    return [
        row["preset"],
        str(row["passes"]),
        row["precision"],
        row["how"],
        str(row["parts"]),
        *speed,
        *memory,
    ]


def _run(rule, shape, device, dtype, backend):
    """Outputs, last state and gradients of a recurrence, by name; its inputs are exact in bfloat16."""
    (B, T, H, K, V), generator = shape, torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=generator)

    given = dict(q=draw(B, T, H, K), k=draw(B, T, H, K), v=draw(B, T, H, V))
    given["k"] = 0.9 * given["k"] / given["k"].norm(dim=-1, keepdim=True)
    given |= dict(g=-draw(B, T, H).abs() / 4, beta=draw(B, T, H).sigmoid(), initial_state=draw(B, H, K, V))
    weights = [draw(B, T, H, V), draw(B, H, K, V)]
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    for name, x in given.items():
        kind = dtype if name in ("q", "k", "v") else wide
        given[name] = x.bfloat16().to(device, kind).requires_grad_()
    # On a GPU, where Numba does not run, the reference is a plain loop over tokens.
    loops = backend == "reference" and torch.device(device).type != "cpu"
    with use_numba(use_numba.on and not loops):
        o, S = rule(**given, backend=backend)
        loss = sum((x.to(wide) * w.bfloat16().to(device, wide)).sum() for x, w in zip((o, S), weights))
        loss.backward()
    return dict(o=o, S=S) | {f"d{name}": x.grad for name, x in given.items()}


def _worst(found, truth):
    """Name and error of what is off the most, relative to its largest entry where that is above 1."""
    errors = {}
    for name, wanted in truth.items():
        wanted, got = (x.detach().double().cpu() for x in (wanted, found[name]))
        off = float((got - wanted).abs().max() / max(1.0, float(wanted.abs().max())))
        errors[name] = off if math.isfinite(off) else 1e308  # JSON has no NaN
    return max(errors.items(), key=lambda entry: entry[1])
