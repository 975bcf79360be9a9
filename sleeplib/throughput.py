"""What training costs: a step on one CPU thread, and the paper's Figure 6 on a GPU."""

import multiprocessing
import sys
import time
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from .algorithm import IGNORE, sleep_forward
from .bench import in_turn
from .device import peak_bytes, tune_malloc
from .model import HybridLM, ModelConfig


def windows_at_once(model, inputs, window):
    """Logits of the last window, all windows read side by side: N = 1 with "keys" eviction, in parallel.

    Attention takes the windows of inputs (B, T) as a batch; fast weights and convolutions run through all T.
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

    ``tokens_per_second`` counts tokens per second of processor time, which other programs disturb little, in
    the fastest of `repeats` steps; ``peak_bytes`` is the memory above that of a step on one sequence of one
    window (Linux).
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


# Ouro-1.4B's shape (24 blocks, width 2048) with six Jet blocks, and the text of the paper's Figure 6.  The
# paper's Jet layers have no MLP; these have one.
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
    """FLOPs of forward and backward of one text, and bytes kept: for all of it, and for one nap.

    Each kind of block is visited once on the meta device, where nothing is computed, and its cost multiplied
    by the number of its visits.  It is not taken into account that nobody reads the last h of a nap.
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

    For windows of 1,000, 2,000 and 4,000 tokens and N = 1, 2 and 4: forward, and backward with recomputation
    of windows, in bfloat16, at the best of the batch sizes 1, 2, 4, ... that fit; for N = 1 also all windows
    at once.  A dry run prints the operations and the bytes kept (in float32), both without recomputation and
    with it, and times a small shape on the CPU.

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
