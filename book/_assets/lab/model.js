// The hybrid of chapter 6 and the sleep of chapter 8, forward only, in plain JavaScript.
// Shapes are those of sleeplib for one sequence: h (T, D) is an array of T rows; S (H, K, V) is one Float64Array.
"use strict";

const SleepModel = (() => {
  // One half-precision number from its 16 bits.
  function half(bits) {
    const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (exponent === 0) return sign * fraction * 2 ** -24;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  }

  // The tensors of a safetensors file: name -> {shape, data}.
  function tensors(bytes) {
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const size = Number(view.getBigUint64(0, true));
    const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + size)));
    const found = {};
    for (const [name, entry] of Object.entries(header)) {
      if (name === "__metadata__") continue;
      if (entry.dtype !== "F16") throw new Error(`${name}: expected F16, got ${entry.dtype}`);
      const [from, to] = entry.data_offsets.map((x) => x + 8 + size);
      const data = new Float64Array((to - from) / 2);
      for (let i = 0; i < data.length; i++) data[i] = half(view.getUint16(from + 2 * i, true));
      found[name] = { shape: entry.shape, data };
    }
    return found;
  }

  const silu = (x) => x / (1 + Math.exp(-x));
  const sigmoid = (x) => 1 / (1 + Math.exp(-x));
  const softplus = (x) => (x > 30 ? x : Math.log1p(Math.exp(x)));

  // W (out, in) times x (in).
  function linear(W, x) {
    const [rows, columns] = W.shape, y = new Float64Array(rows);
    for (let i = 0, at = 0; i < rows; i++) {
      let sum = 0;
      for (let j = 0; j < columns; j++) sum += W.data[at++] * x[j];
      y[i] = sum;
    }
    return y;
  }

  function rmsNorm(x, weight, eps) {
    let sum = 0;
    for (const value of x) sum += value * value;
    const scale = 1 / Math.sqrt(sum / x.length + eps);
    return x.map((value, i) => value * scale * weight.data[i]);
  }

  // Turn each pair (x[j], x[j + K / 2]) of every head by its position (chapter 1).
  function rotate(x, position, K, base) {
    const y = x.slice();
    for (let start = 0; start < x.length; start += K) {
      for (let j = 0; j < K / 2; j++) {
        const angle = position * base ** ((-2 * j) / K), c = Math.cos(angle), s = Math.sin(angle);
        const one = x[start + j], two = x[start + j + K / 2];
        y[start + j] = one * c - two * s;
        y[start + j + K / 2] = two * c + one * s;
      }
    }
    return y;
  }

  class Hybrid {
    constructor(config, bytes) {
      this.config = config;
      this.weights = tensors(bytes);
      this.K = config.key_size || config.d_model / config.num_heads;
      this.V = config.value_size || 2 * this.K;
    }

    weight(block, name) {
      return this.weights[`layers.${block}.${name}`];
    }

    // Fast weights at the start of a stream: zeros, null for a block of attention.
    emptyState() {
      const size = this.config.num_heads * this.K * this.V;
      return [...this.config.pattern].map((kind) => (kind === "a" ? null : new Float64Array(size)));
    }

    embed(tokens) {
      const D = this.config.d_model, table = this.weights["embedding.weight"].data;
      return tokens.map((token) => table.slice(token * D, (token + 1) * D));
    }

    // Causal attention within one window; the cache starts empty.
    attention(block, x) {
      const { num_heads: H, d_model: D, rope_base: base } = this.config, K = D / H;
      const [q, k, v] = ["q", "k", "v"].map((name) => x.map((row) => linear(this.weight(block, `mixer.${name}.weight`), row)));
      const turnedQ = q.map((row, t) => rotate(row, t, K, base)), turnedK = k.map((row, t) => rotate(row, t, K, base));
      return x.map((_, t) => {
        const output = new Float64Array(D);
        for (let head = 0; head < H; head++) {
          const scores = [];
          for (let s = 0; s <= t; s++) {
            let score = 0;
            for (let i = head * K; i < (head + 1) * K; i++) score += turnedQ[t][i] * turnedK[s][i];
            scores.push(score / Math.sqrt(K));
          }
          const most = Math.max(...scores), weights = scores.map((score) => Math.exp(score - most));
          const total = weights.reduce((a, b) => a + b);
          for (let s = 0; s <= t; s++) {
            for (let i = head * K; i < (head + 1) * K; i++) output[i] += (weights[s] / total) * v[s][i];
          }
        }
        return linear(this.weight(block, "mixer.o.weight"), output);
      });
    }

    // Gated DeltaNet: reads and writes S, which is changed in place.
    fastWeights(block, x, S) {
      const H = this.config.num_heads, { K, V } = this, get = (name) => this.weight(block, `mixer.${name}`);
      const project = (name) => x.map((row) => linear(get(`${name}.weight`), row));
      const [q, k, v, gate, a, b] = ["q", "k", "v", "gate", "a", "b"].map(project);
      const conv = get("conv.weight"), [taps, channels] = conv.shape;
      const raw = x.map((_, t) => Float64Array.from([...q[t], ...k[t], ...v[t]]));
      const mixed = raw.map((_, t) => {
        const y = new Float64Array(channels);
        for (let i = 0; i < taps; i++) {
          const from = t - (taps - 1) + i; // the oldest tap comes first
          if (from >= 0) for (let c = 0; c < channels; c++) y[c] += conv.data[i * channels + c] * raw[from][c];
        }
        return y.map(silu);
      });
      const unit = (z) => {
        const length = Math.sqrt(z.reduce((sum, value) => sum + value * value, 0) + 1e-6);
        return z.map((value) => value / length);
      };
      return x.map((_, t) => {
        const output = new Float64Array(H * V);
        for (let head = 0; head < H; head++) {
          const query = unit(mixed[t].slice(head * K, (head + 1) * K));
          const key = unit(mixed[t].slice((H + head) * K, (H + head + 1) * K));
          const value = mixed[t].slice(2 * H * K + head * V, 2 * H * K + (head + 1) * V);
          const decay = Math.exp(-Math.exp(get("A_log").data[head]) * softplus(a[t][head] + get("dt_bias").data[head]));
          const beta = sigmoid(b[t][head]), at = head * K * V, o = new Float64Array(V);
          for (let j = 0; j < V; j++) {
            let read = 0;
            for (let i = 0; i < K; i++) read += (S[at + i * V + j] *= decay) * key[i]; // decay, read
            const error = beta * (value[j] - read);
            for (let i = 0; i < K; i++) {
              S[at + i * V + j] += key[i] * error; // write
              o[j] += (S[at + i * V + j] * query[i]) / Math.sqrt(K); // output
            }
          }
          const normed = rmsNorm(o, get("norm.weight"), 1e-5);
          for (let j = 0; j < V; j++) output[head * V + j] = normed[j] * silu(gate[t][head * V + j]);
        }
        return linear(get("o.weight"), output);
      });
    }

    // One pass over a window: h goes through every block, S is written; caches start empty.
    pass(h, S) {
      const after = S.map((part) => part && part.slice());
      [...this.config.pattern].forEach((kind, block) => {
        const x = h.map((row) => rmsNorm(row, this.weight(block, "mixer_norm.weight"), 1e-6));
        const y = kind === "a" ? this.attention(block, x) : this.fastWeights(block, x, after[block]);
        h = h.map((row, t) => row.map((value, i) => value + y[t][i]));
        h = h.map((row) => {
          const z = rmsNorm(row, this.weight(block, "mlp_norm.weight"), 1e-6);
          const gate = linear(this.weight(block, "mlp.gate.weight"), z);
          const up = linear(this.weight(block, "mlp.up.weight"), z);
          const y = linear(this.weight(block, "mlp.down.weight"), gate.map((value, i) => silu(value) * up[i]));
          return row.map((value, i) => value + y[i]);
        });
      });
      return { h, S: after };
    }

    // Sleep on one window: N passes; gives S after each.
    sleep(tokens, S, passes) {
      let h = this.embed(tokens);
      const history = [];
      for (let n = 0; n < passes; n++) {
        ({ h, S } = this.pass(h, S));
        history.push(S);
      }
      return history;
    }

    // Read tokens awake, in one pass: the logits at each, and S after.
    read(tokens, S) {
      const after = this.pass(this.embed(tokens), S);
      const norm = this.weights["norm.weight"], head = this.weights["head.weight"];
      return { logits: after.h.map((row) => linear(head, rmsNorm(row, norm, 1e-6))), S: after.S };
    }
  }

  return { Hybrid };
})();

if (typeof module !== "undefined") module.exports = SleepModel;
