"""``python -m sleeplib bench``: speed beside transformers' kernels, data, streaming, memory, in one run.

A benchmark, never a test: it prints medians of runs taken in turn, so that a drift of the machine's speed
falls on both sides alike.
"""

import multiprocessing
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from . import experiments, records
from .algorithm import IGNORE, sleep_forward
from .device import multiplies_bfloat16, peak_bytes, tune_malloc
from .flops import training_flops
from .kernels import gated_delta_rule, softmax_attention
from .model import HybridLM, ModelConfig
from .sleeper import Sleeper
from .training import Trainer, training_batch

SHAPES = ((128, 24, 4, 16, 32), (4, 256, 4, 64, 128))  # B, T, H, K, V


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
    from transformers.models.qwen3_next import modeling_qwen3_next as oracle

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
        both = [chunk, partial(ours, "reference"), partial(ours, "chunked")]
        theirs, reference, chunked = in_turn([partial(_forward_backward, f) for f in both], repeats)
        print(
            f"forward and backward  {shape}: transformers chunk {theirs * 1e3:7.2f} ms, reference "
            f"{reference * 1e3:6.2f} ms, chunked {chunked * 1e3:6.2f} ms, ratio "
            f"{theirs / min(reference, chunked):.1f}"
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
    """Time a whole training step beside the same model on transformers' kernel."""
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
from sleeplib import device, layers
width, mode, repeats = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
if mode == "autocast":  # what autocast does by itself: activations in bfloat16, which our kernels do not take
    layers.project = lambda x, *all: torch.nn.functional.linear(x, torch.cat([part.weight for part in all]))
precision = "float32" if mode == "float32" else "bfloat16"
experiment = sl.experiments.get("rule110-paper").replace(d_model=width, batch=64, precision=precision)
trainer, times = sl.Trainer(experiment, 1, 0, "cpu"), []
for _ in range(repeats + 1):
    began = time.perf_counter()
    trainer.train_step()
    times.append(time.perf_counter() - began)
print(statistics.median(times[1:]), device.peak_bytes(torch.device("cpu")) / 2**30)
"""


def precisions(repeats, widths=(64, 256, 512)):
    """Time rule110-paper's step at batch 64 in each precision, in one process and in two side by side."""
    native = multiplies_bfloat16(torch.device("cpu"))
    peak = matmul_peak(repeats, dtype=torch.bfloat16 if native else torch.float32)
    kind = "bfloat16" if native else "float32 (this processor has no products in bfloat16)"
    print(f"matrix product, 1024 cubed, {kind}: {peak / 1e9:.0f} GFLOP/s, one thread")
    print("width  precision  processes  tokens/s each  of that peak  GiB each")
    for width in widths:
        e = experiments.get("rule110-paper").replace({"model.d_model": width, "train.batch": 64})
        tokens, work = e.train.batch * e.task.length, training_flops(e, 1)
        for count in (1, 2):
            for mode in ("float32", "autocast", "ours") if native else ("float32",):
                command = [sys.executable, "-c", STEP_PROBE, str(width), mode, str(max(3, repeats // 2))]
                probes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
                found = [tuple(map(float, probe.communicate()[0].split())) for probe in probes]
                seconds, memory = (max(column) for column in zip(*found))
                share = f"{100 * work / seconds / peak:10.0f} %"
                print(
                    f"{width:5}  {mode:9}  {count:9}  {tokens / seconds:13,.0f}  {share:>12}  {memory:8.1f}"
                )


def generators(repeats, presets=("rule110-paper", "depo-paper", "gsm_infinite-small")):
    """Time what draws a training batch, on one core, data split and labels included."""
    rng = np.random.default_rng(0)
    for preset in presets:
        experiment = experiments.get(preset)
        task, size = experiment.task, experiment.train.batch
        (seconds,) = in_turn([partial(task.batch, size, rng)], repeats)
        print(
            f"{preset}: a batch of {size} in {seconds * 1e3:.2f} ms, {size / seconds:,.0f} sequences a second"
        )


def streaming(preset="rule110-quick", tokens=100_000, piece=4):
    """Time reading after sleep, the nap itself, and count carried bytes along a long stream."""
    experiment = experiments.get(preset)
    task = experiment.task
    torch.manual_seed(0)
    model = Trainer(experiment, 1, 0, "cpu").model
    stream = torch.randint(0, 2, (1, tokens))
    readers = {n: Sleeper(model, window=task.window, passes=n) for n in (1, 8)}
    wake, nap = {n: [] for n in readers}, {n: [] for n in readers}
    for start in range(0, 600 * piece, piece):  # in turn, so that drift falls on both alike
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
    """Peak memory of one training step over that of a one-window step, each in a fresh process (Linux)."""
    print("memory of a training step above that of one window, one pass, MiB (batch 64, L = 24, width 64)")
    print("windows  N   plain   checkpointed over windows")
    for windows, passes in ((4, 1), (16, 1), (4, 4), (16, 4)):
        row = []
        for checkpoint in (False, True):
            command = [sys.executable, "-c", MEMORY_PROBE, str(windows), str(passes), str(checkpoint)]
            row.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
        print(f"{windows:7} {passes:2} {row[0]:7} {row[1]:7}")


def windows_at_once(model, inputs, window):
    """Logits of the last window, all windows read side by side: N = 1 with "keys" eviction, in parallel.

    Attention has the windows of inputs (B, T) in its batch; fast weights and convolutions run through all T.
    """
    h, state = model.embed(inputs), model.initial_state(len(inputs))
    context = (inputs.shape[1] - 1) // window * window
    for i, layer in enumerate(model.layers):
        if state.fast_weights[i] is not None:
            h, _ = layer(h, state.block(i))
            continue
        past, last = h.split((context, h.shape[1] - context), dim=1)
        past, _ = layer(past.unflatten(1, (-1, window)).flatten(0, 1), state.block(i))
        h = torch.cat((past.unflatten(0, (len(h), -1)).flatten(1, 2), layer(last, state.block(i))[0]), dim=1)
    return model.readout(h[:, context:])


def step_cost(**settings):
    """Cost of forward and backward of one batch on one thread, in a process of its own: dict of float.

    ``tokens_per_second`` are tokens a second of processor time, the fastest of `repeats` steps, which other
    programs disturb little; ``peak_bytes`` is memory above that of a step of one small window (Linux).
    Settings and their defaults are those of :func:`_step_cost`.

    Chapter: 10_training
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    receive, send = context.Pipe(duplex=False)
    worker = context.Process(target=_step_cost, args=(send,), kwargs=settings)
    worker.start()
    send.close()
    try:
        seconds, memory = receive.recv()
    except EOFError:
        raise RuntimeError(f"the step failed, see above; settings {settings}") from None
    finally:
        worker.join()
    tokens = settings.get("batch", 4) * (settings.get("context", 1024) + QUESTION)
    return dict(tokens_per_second=tokens / seconds, peak_bytes=memory)


QUESTION = 16  # tokens of the last window, which is read awake


def _step_cost(
    pipe, batch=4, context=1024, window=128, passes=1, width=128, pattern="agag", checkpoint=False,
    truncate=None, precision="float32", at_once=False, repeats=4,
):  # fmt: skip
    """Send the seconds of a step and its memory down a pipe."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tune_malloc()
    model = HybridLM(ModelConfig(vocab_size=64, d_model=width, num_heads=4, pattern=pattern))
    low = precision == "bfloat16"

    def step(batch, context, passes):
        inputs = torch.randint(0, 64, (batch, context + QUESTION))
        labels = torch.full_like(inputs, IGNORE)
        labels[:, context:] = 1
        model.zero_grad()
        began = time.process_time()
        with torch.autocast("cpu", dtype=torch.bfloat16) if low else nullcontext():
            if at_once:
                logits = windows_at_once(model, inputs, window).flatten(0, 1)
                loss = F.cross_entropy(logits.float(), labels[:, context:].flatten())
            else:
                options = dict(window=window, passes=passes, checkpoint=checkpoint, truncate=truncate)
                loss = sleep_forward(model, inputs, labels, return_logits=False, **options).loss
        loss.backward()
        return time.process_time() - began

    step(1, window, 1)
    before = peak_bytes(torch.device("cpu"))
    seconds = min([step(batch, context, passes) for _ in range(repeats + 1)][1:])
    pipe.send((seconds, peak_bytes(torch.device("cpu")) - before))


def gpu(repeats, preset="rule110-small"):
    """On CUDA: tokens per second of a training step, eager and as one CUDA graph."""
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
            share = training_flops(experiment, passes) / seconds / peaks[torch.float32]
            print(
                f"{preset} step, N = {passes}, graph {graph}: {seconds * 1e3:.1f} ms, "
                f"{tokens / 1e6:.2f} M tokens/s, {100 * share:.1f} % of the float32 peak"
            )


# Ouro-1.4B's shape (24 blocks, width 2048) with six Jet blocks, and the text of the paper's Figure 6.  The
# paper's Jet layers have no MLP, ours have one.
FIGURE6 = dict(vocab_size=49_152, d_model=2048, num_heads=16, mlp_size=5632, pattern="aaaaj" * 6)
TEXT, LENGTHS = 12_000, (1000, 2000, 4000)


def _figure6_loss(model, inputs, labels, window, passes, at_once, checkpoint):
    """The loss of the last window."""
    if at_once:
        logits = windows_at_once(model, inputs, window).flatten(0, 1)
        return F.cross_entropy(logits.float(), labels[:, -logits.shape[0] // len(inputs) :].flatten())
    awake = (False,) * (inputs.shape[1] // window - 1) + (True,)
    options = dict(window=window, passes=passes, checkpoint=checkpoint, awake=awake)
    return sleep_forward(model, inputs, labels, return_logits=False, **options).loss


def _predicted(config, window, naps, passes):
    """FLOPs of forward and backward of one text, and bytes kept: of all of it, and of one nap.

    Each kind of block is visited once on the meta device, where nothing is computed, and its cost multiplied
    by its visits.  That nobody reads the last h of a nap is left out.
    """
    from torch.utils.flop_counter import FlopCounterMode

    readout = 6 * window * config.d_model * config.vocab_size
    total, nap = np.zeros(2), np.zeros(2)
    for kind in sorted(set(config.pattern)):
        with torch.device("meta"):
            model = HybridLM(replace(config, pattern=kind))
            h, kept = torch.zeros(1, window, config.d_model, requires_grad=True), {}
        weights = {p.untyped_storage()._cdata for p in model.parameters()}

        def pack(x, kept=kept):
            kept[x.untyped_storage()._cdata] = x
            return x

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        with FlopCounterMode(display=False) as counter, hooks:
            model.blocks(h, model.initial_state(1))[0].sum().backward()
        sizes = [x.untyped_storage().nbytes() for key, x in kept.items() if key not in weights]
        visit = config.pattern.count(kind) * np.array([counter.get_total_flops(), sum(sizes)], dtype=float)
        nap += passes * visit
        total += visit
    total += naps * nap
    return total[0] + readout, total[1], nap[1]


def figure6(dry_run=False, repeats=3):
    """Throughput of training at the paper's Figure 6: on one GPU, or as a dry run its predicted cost.

    For windows of 1,000, 2,000 and 4,000 tokens and N = 1, 2 and 4: forward, backward with recomputation of
    windows, in bfloat16, at the best of the batch sizes 1, 2, 4, ... that fit; for N = 1 also all windows at
    once.  A dry run prints the operations and the bytes kept, in float32 and without recomputation and with,
    and times a small shape on the CPU.

    Chapter: 10_training
    """
    rows = [(L, n, False) for L in LENGTHS for n in (1, 2, 4)] + [(L, 1, True) for L in LENGTHS]
    config = ModelConfig(**FIGURE6, backend="chunked" if dry_run else "auto")
    if dry_run:
        print("predicted, one text of 12,000 tokens; kept for the way back in float32")
        print("window  N  TFLOP  with recomputation  GiB kept  with recomputation")
        for L, n, at_once in rows:
            if not at_once:
                flops, kept, nap = _predicted(config, L, TEXT // L - 1, n)
                again = f"{flops / 1e12 * 4 / 3:18.0f}  {kept / 2**30:8.0f}  {nap / 2**30:18.0f}"
                print(f"{L:6} {n:2} {flops / 1e12:6.0f}  {again}")
        print("measured at a small shape: width 128, 1,040 tokens, one thread of this CPU")
        for row in [dict(window=w) for w in (64, 128, 256)] + [dict(passes=n) for n in (2, 4)]:
            cost = step_cost(repeats=repeats, **row)
            print(f"{row}: {cost['tokens_per_second']:,.0f} tokens/s, {cost['peak_bytes'] / 2**20:.0f} MiB")
        return
    if not torch.cuda.is_available():
        raise ValueError("figure6 needs a CUDA device; --dry-run does not")
    print(torch.cuda.get_device_name())
    with torch.device("cuda"):
        model = HybridLM(config)
    for L, n, at_once in rows:
        best, batch = (0.0, 0, 0.0), 1
        while batch:
            inputs = torch.randint(0, config.vocab_size, (batch, TEXT), device="cuda")
            labels = torch.full_like(inputs, IGNORE)
            labels[:, TEXT - L :] = inputs[:, TEXT - L :]

            def step(inputs=inputs, labels=labels, L=L, n=n, at_once=at_once):
                model.zero_grad()
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    loss = _figure6_loss(model, inputs, labels, L, n, at_once, not at_once)
                loss.backward()

            torch.cuda.reset_peak_memory_stats()
            try:
                (seconds,) = in_turn([step], repeats)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                break
            found = batch * TEXT / seconds, batch, torch.cuda.max_memory_allocated() / 2**30
            best, batch = max(best, found), 2 * batch
        how = "at once" if at_once else "in turn"
        print(f"window {L}, N = {n}, {how}: {best[0]:,.0f} tokens/s at batch {best[1]}, {best[2]:.0f} GiB")


def main(repeats=9):
    """Run every part and print it."""
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
    precisions(repeats)
    generators(repeats)
    streaming()
    memory()
