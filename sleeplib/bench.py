"""``python -m sleeplib bench``: kernels beside those of transformers, data, streaming, memory, in one run.

A benchmark, never a test: it prints medians of runs taken in turn, so that a drift in the machine's speed
affects both sides alike.
"""

import statistics
import subprocess
import sys
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from . import experiments, records
from .checks import integer
from .device import multiplies_bfloat16
from .flops import training_flops
from .kernels import gated_delta_rule, softmax_attention
from .sleeper import Sleeper
from .training import Trainer, training_batch

SHAPES = (
    (128, 24, 4, 16, 32),
    (4, 256, 4, 64, 128),
    (64, 24, 4, 64, 128),
    (64, 8, 4, 64, 128),
)  # B, T, H, K, V


def in_turn(functions, repeats):
    """Median seconds of each function, run in turn after one warm-up, synchronised on CUDA."""
    times = [[] for _ in functions]
    for turn in range(repeats + 1):
        for seconds, function in zip(times, functions):
            began = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds.append(time.perf_counter() - began)
    return [statistics.median(seconds) for seconds in times]


def matmul_peak(repeats, device="cpu", dtype=torch.float32, size=1024):
    """Measured FLOP/s of a square matrix product."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / in_turn([lambda: a @ b], repeats)[0]


def kernels(repeats):
    """Time the recurrence, forward and forward + backward."""
    try:
        from transformers.models.qwen3_next import modeling_qwen3_next as oracle
    except ImportError as error:
        raise ImportError("bench needs transformers: pip install 'sleeplib[pretrained]'") from error

    for B, T, H, K, V in SHAPES:
        torch.manual_seed(0)
        q, k = (F.normalize(torch.randn(B, T, H, K), dim=-1) for _ in range(2))
        inputs = [q, k, torch.randn(B, T, H, V), -torch.rand(B, T, H), torch.rand(B, T, H)]
        shape = f"B{B} T{T} H{H} K{K} V{V}"

        def ours(backend, tensors=inputs):
            q, k, v, g, beta = tensors
            return gated_delta_rule(q, k, v, g=g, beta=beta, backend=backend)[0]

        def recurrent(tensors=inputs):
            return oracle.torch_recurrent_gated_delta_rule(*tensors, None, True)[0]

        def chunk(tensors=inputs):
            return oracle.torch_chunk_gated_delta_rule(*tensors, 64, None, True)[0]

        slow, fast = in_turn([recurrent, partial(ours, "reference")], repeats)
        print(
            f"forward               {shape}: transformers recurrent {slow * 1e3:7.2f} ms, "
            f"reference {fast * 1e3:6.2f} ms, ratio {slow / fast:.1f}"
        )
        for x in inputs:
            x.requires_grad_()
        ways = [chunk, *(partial(ours, name) for name in ("reference", "chunked", "wy"))]
        theirs, reference, chunked, wy = in_turn([partial(_forward_backward, f) for f in ways], repeats)
        print(
            f"forward and backward  {shape}: transformers chunk {theirs * 1e3:7.2f} ms, reference "
            f"{reference * 1e3:6.2f} ms, chunked {chunked * 1e3:6.2f} ms, wy {wy * 1e3:6.2f} ms, ratio "
            f"{theirs / min(reference, chunked, wy):.1f}"
        )


def _forward_backward(function):
    function().sum().backward()


def attention(repeats):
    """Time attention by loops beside PyTorch's, forward and backward, at windows of several lengths."""
    for T in (12, 24, 64, 128, 256):
        q, k, v = (torch.randn(1536 // T, T, 4, 16, requires_grad=True) for _ in range(3))

        def torchs(tensors=(q, k, v)):
            q, k, v = (x.transpose(1, 2) for x in tensors)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        def loops(tensors=(q, k, v)):
            return softmax_attention(*tensors)

        theirs, ours = in_turn([partial(_forward_backward, f) for f in (torchs, loops)], repeats)
        print(
            f"attention, forward and backward, B{len(q)} T{T} H4 K16: PyTorch {theirs * 1e3:6.2f} ms, "
            f"loops {ours * 1e3:6.2f} ms, ratio {theirs / ours:.1f}"
        )


def training_step(repeats, preset="rule110-quick"):
    """Time a whole training step, beside one of the same model on transformers' kernel."""
    from transformers.models.qwen3_next import modeling_qwen3_next as oracle

    def theirs(q, k, v, *, g, beta, initial_state, backend):
        return oracle.torch_chunk_gated_delta_rule(q, k, v, g, beta, 64, initial_state, True)

    experiment = experiments.get(preset)
    peak = matmul_peak(repeats)
    print(f"matrix product, 1024 cubed, float32: {peak / 1e9:.0f} GFLOP/s")
    for passes in experiment.passes:
        trainers = [Trainer(experiment, passes, 0, "cpu") for _ in range(2)]
        for layer in trainers[1].model.layers:
            if hasattr(layer.mixer, "rule"):
                layer.mixer.rule = theirs
        ours, other = in_turn([t.train_step for t in trainers], max(3, repeats // 2))
        rate = training_flops(experiment, passes) / ours
        print(
            f"{preset} step, N = {passes}: ours {ours * 1e3:6.0f} ms, on transformers' kernel "
            f"{other * 1e3:6.0f} ms, ratio {other / ours:.1f}; {100 * rate / peak:.0f} % of the measured peak"
        )


STEP_PROBE = """
import sys, statistics, time, torch, sleeplib as sl
from sleeplib import device, kernels, layers
preset, mode, repeats, *settings = sys.argv[1:]
torch.set_num_threads(1)
if mode == "autocast":  # plain PyTorch in place of the loops that take bfloat16, attention too
    layers.low_on_cpu = lambda x: False
    for module in (kernels.convolution, kernels.gate, kernels.norm):
        module.compiled = lambda *tensors, low=False: kernels.compiled(*tensors)
settings = dict(setting.split("=") for setting in settings)
settings["train.precision"] = "float32" if mode == "float32" else "bfloat16"
trainer, times = sl.Trainer(sl.experiments.get(preset).replace(settings), 1, 0, "cpu"), []
for _ in range(int(repeats) + 1):
    began = time.perf_counter()
    trainer.train_step()
    times.append(time.perf_counter() - began)
print(statistics.median(times[1:]), device.peak_bytes(torch.device("cpu")) / 2**30)
"""
STEPS = [("rule110-paper", width, 64) for width in (64, 256, 512)]
STEPS += [("rule110-paper", 256, 512), ("depo-small", 256, 16), ("gsm_infinite-small", 256, 16)]


def precisions(repeats, steps=STEPS):
    """Time steps of presets at a width and a batch size in each precision, in one process and in two at once.

    Returns what it prints: ``peaks``, GFLOP/s of a product in each precision, and ``rows``.

    Chapter: 10_training
    """
    native = multiplies_bfloat16(torch.device("cpu"))
    peaks = {kind: matmul_peak(repeats, dtype=getattr(torch, kind)) for kind in ("float32", "bfloat16")}
    made = ", ".join(f"{kind} {peak / 1e9:.0f} GFLOP/s" for kind, peak in peaks.items())
    print(f"matrix product, 1024 cubed, one thread: {made}")
    peak, rows = peaks["bfloat16" if native else "float32"], []
    print("preset              width  batch  precision  processes  tokens/s each  of that peak  GiB each")
    for preset, width, batch in steps:
        settings = {"model.d_model": width, "train.batch": batch}
        e = experiments.get(preset).replace(settings)
        settings = [f"{name}={value}" for name, value in settings.items()]
        tokens, work = batch * e.task.length, training_flops(e, 1)
        for count in (1, 2):
            for mode in ("float32", "autocast", "ours") if native else ("float32",):
                command = [
                    sys.executable,
                    "-c",
                    STEP_PROBE,
                    preset,
                    mode,
                    str(max(3, repeats // 2)),
                    *settings,
                ]
                probes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
                found = [tuple(map(float, probe.communicate()[0].split())) for probe in probes]
                if any(probe.returncode for probe in probes):
                    raise RuntimeError(f"a step of {preset} failed; what went wrong is said above")
                seconds, memory = (max(column) for column in zip(*found))
                row = dict(preset=preset, width=width, batch=batch, precision=mode, processes=count)
                row |= dict(tokens_per_second=round(tokens / seconds), gib=round(memory, 2))
                rows.append(row | dict(share=round(work / seconds / peak, 3)))
                print(
                    f"{preset:19} {width:5}  {batch:5}  {mode:9}  {count:9}  {tokens / seconds:13,.0f}"
                    f"  {100 * rows[-1]['share']:10.0f} %  {memory:8.1f}"
                )
    return dict(peaks={kind: round(peak / 1e9) for kind, peak in peaks.items()}, rows=rows)


def generators(repeats, presets=("rule110-paper", "depo-paper", "gsm_infinite-small")):
    """Time the drawing of a training batch on one core, data split and labels included."""
    rng = np.random.default_rng(0)
    for preset in presets:
        experiment = experiments.get(preset)
        task, size = experiment.task, experiment.train.batch
        (seconds,) = in_turn([partial(task.batch, size, rng)], repeats)
        print(
            f"{preset}: a batch of {size} in {seconds * 1e3:.2f} ms, {size / seconds:,.0f} sequences a second"
        )


def streaming(preset="rule110-quick", tokens=100_000, piece=4):
    """Time reading awake and the nap itself, and count the bytes carried along a long stream."""
    experiment = experiments.get(preset)
    task = experiment.task
    torch.manual_seed(0)
    model = Trainer(experiment, 1, 0, "cpu").model
    stream = torch.randint(0, 2, (1, tokens))
    readers = {n: Sleeper(model, window=task.window, passes=n) for n in (1, 8)}
    wake, nap = {n: [] for n in readers}, {n: [] for n in readers}
    for start in range(0, 600 * piece, piece):  # in turn, so that drift affects both alike
        for n, reader in readers.items():
            naps, began = reader.naps, time.perf_counter()
            reader.feed(stream[:, start : start + piece])
            seconds = time.perf_counter() - began
            (nap if reader.naps > naps else wake)[n].append(seconds)
    for n in readers:
        awake = statistics.median(wake[n]) / piece
        asleep = statistics.median(nap[n]) - awake * piece
        print(
            f"streaming, N = {n}: {awake * 1e3:.2f} ms a token awake, a nap {asleep * 1e3:.1f} ms, "
            f"{(awake + asleep / task.window) * 1e3:.2f} ms a token with naps"
        )
    reader, carried = Sleeper(model, window=task.window, passes=4), {}
    whole = 50 * task.window  # pieces end where a window ends, so that bytes are counted after a nap
    for piece in stream[:, : tokens - tokens % whole].split(whole, dim=1):
        reader.feed(piece)
        carried[reader.state.position] = reader.nbytes()
    sizes = sorted(set(carried.values()))
    print(f"streaming, {reader.state.position} tokens, {reader.naps} naps: carried bytes after a nap {sizes}")


MEMORY_PROBE = """
import sys, torch, sleeplib as sl
from sleeplib.device import peak_bytes
windows, passes, checkpoint = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
torch.set_num_threads(1)
model = sl.HybridLM(sl.ModelConfig(vocab_size=4, d_model=64, pattern="agag"))
def step(windows, passes):
    inputs = torch.randint(0, 4, (64, 24 * (windows + 1)))
    labels = torch.full_like(inputs, -100)
    labels[:, -1] = 1
    options = dict(window=24, passes=passes, checkpoint=checkpoint, return_logits=False)
    sl.sleep_forward(model, inputs, labels, **options).loss.backward()
step(1, 1)
before = peak_bytes(torch.device("cpu"))
step(windows, passes)
print((peak_bytes(torch.device("cpu")) - before) // 2**20)
"""


def memory():
    """Print a training step's peak memory above that of a one-window step, in fresh processes (Linux)."""
    print("memory of a training step above that of one window, one pass, MiB (batch 64, L = 24, width 64)")
    print("windows  N   plain   checkpointed over windows")
    for windows, passes in ((4, 1), (16, 1), (4, 4), (16, 4)):
        row = []
        for checkpoint in (False, True):
            command = [sys.executable, "-c", MEMORY_PROBE, str(windows), str(passes), str(checkpoint)]
            row.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        print(f"{windows:7} {passes:2} {row[0]:7} {row[1]:7}")


def gpu(repeats, preset="rule110-small"):
    """Time training steps on CUDA, eager and as one CUDA graph."""
    name = torch.cuda.get_device_name()
    peaks = {d: matmul_peak(repeats, "cuda", d, 8192) for d in (torch.float32, torch.bfloat16)}
    print(
        f"{name}: matrix product 8192 cubed: "
        + ", ".join(f"{d} {p / 1e12:.0f} TFLOP/s" for d, p in peaks.items())
    )
    for passes in (1, 2, 4):
        for graph in ("false", "true"):
            experiment = experiments.get(preset).replace({"train.graph": graph})
            trainer = Trainer(experiment, passes, 0, "cuda")
            batch = training_batch(experiment.task, experiment.train, 0, 0)
            for _ in range(3):
                trainer.forward_backward(batch)
            seconds = in_turn([trainer.train_step], repeats)[0]
            tokens = experiment.train.batch * experiment.task.length / seconds
            peak = peaks[getattr(torch, trainer.precision)]  # of what ran
            share = training_flops(experiment, passes) / seconds / peak
            print(
                f"{preset} step, N = {passes}, graph {graph}: {seconds * 1e3:.1f} ms, "
                f"{tokens / 1e6:.2f} M tokens/s, {100 * share:.1f} % of the {trainer.precision} peak"
            )


def main(repeats=9):
    """Run every part and print its results."""
    repeats = integer("repeats", repeats, 1)
    print(records.processor())
    if torch.cuda.is_available():
        gpu(repeats)
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        print(f"--- threads: {threads}")
        kernels(repeats)
        attention(repeats)
        training_step(repeats)
    torch.set_num_threads(1)
    precisions(repeats, [step for step in STEPS if step[2] == 64])
    generators(repeats)
    streaming()
    memory()
