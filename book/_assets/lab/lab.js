// The page around the model: rings to click, a slider through the nap, and the answers.
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  const root = document.getElementById("sleep-lab");
  if (!root) return;
  const WIDTH = 12, STEPS = 6, ANSWER = 2, NAMES = { 4: "trained to sleep with N = 4", 1: "trained without sleep, N = 1" };
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const models = {};
  for (const [n, { config, weights }] of Object.entries(SLEEP_LAB_MODELS)) models[n] = new SleepModel.Hybrid(config, bytes(weights));

  // Rule 110 on a ring: the next state of a cell from its left neighbour, itself, and its right neighbour.
  const step = (ring) => ring.map((cell, i) => (110 >> (4 * ring.at(i - 1) + 2 * cell + ring[(i + 1) % WIDTH])) & 1);
  const rollout = (ring) => {
    const rows = [ring];
    while (rows.length <= STEPS) rows.push(step(rows.at(-1)));
    return rows;
  };
  const randomRing = () => Array.from({ length: WIDTH }, () => (Math.random() < 0.5 ? 0 : 1));

  const state = { rings: [[0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0], [1, 0, 0, 0, 1, 1, 0, 1, 0, 1, 1, 0]], model: 4, passes: 4, reset: false, moment: 0 };

  // Everything that happens, as a list of moments; the slider chooses one.
  function run({ rings, model: which, passes, reset }) {
    const model = models[which], moments = [];
    let S = model.emptyState();
    const add = (text, cache, change) => moments.push({ text, cache, S, change });
    add("Nothing is read yet: the cache is empty, and S is zero.", 0, null);
    rings.forEach((ring, r) => {
      let before = S;
      model.sleep(ring, S, passes).forEach((after, n) => {
        S = after;
        const name = n === 0 ? "pass 1, the ring is read" : `pass ${n + 1}, the ring is gone over again`;
        add(`Ring ${r + 1}, ${name}. Its ${WIDTH} tokens are in the cache.`, WIDTH, distance(before, S));
        before = S;
      });
      add(`The cache is emptied. Ring ${r + 1} can be reached only through S now.`, 0, null);
    });
    if (reset) {
      S = model.emptyState();
      add("S is reset to zero, on your wish: the model wakes without a memory.", 0, null);
    }
    const answers = answer(model, S);
    add("The questions: what is the first cell of each ring after six steps? The model answers in one pass.", 2, null);
    moments.at(-1).answers = answers;
    return { moments, answers };
  }

  // The two answers; the second is asked with the first one in view, as in training.
  function answer(model, S) {
    const tokens = [ANSWER], answers = [];
    for (let r = 0; r < 2; r++) {
      const logits = model.read(tokens, S).logits.at(-1), p = 1 / (1 + Math.exp(logits[0] - logits[1]));
      answers.push({ bit: p > 0.5 ? 1 : 0, p: Math.max(p, 1 - p), logits });
      tokens.push(answers[r].bit);
    }
    return answers;
  }

  function distance(a, b) {
    let change = 0, size = 0;
    b.forEach((part, i) => part && part.forEach((value, j) => {
      change += (value - a[i][j]) ** 2;
      size += value ** 2;
    }));
    return Math.sqrt(change / (size || 1));
  }

  // Drawing

  const el = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) name.startsWith("on") ? node.addEventListener(name.slice(2), value) : node.setAttribute(name, value);
    node.append(...children);
    return node;
  };

  const ringBoxes = state.rings.map((_, r) => el("div", { class: "lab-ring", role: "group", "aria-label": `Ring ${r + 1}, twelve cells` }));
  const canvas = el("canvas", { width: 528, height: 150, role: "img", "aria-label": "The fast weights" });
  const slider = el("input", { type: "range", min: 0, max: 0, value: 0, id: "lab-moment", oninput: () => { pause(); show(Number(slider.value)); } });
  const text = el("p", { class: "lab-text", "aria-live": "polite", id: "lab-text" });
  const cache = el("div", { class: "lab-cache", "aria-hidden": "true" });
  const result = el("div", { class: "lab-result", id: "lab-result", "aria-live": "polite" });
  const history = el("div", { class: "lab-history" });
  const score = el("span", { id: "lab-score", "aria-live": "polite" });
  const select = (id, label, options, change) => {
    const box = el("select", { id, onchange: () => change(box.value) }, ...options.map(([value, name]) => el("option", { value }, name)));
    return el("label", { for: id }, `${label} `, box);
  };
  const chooseModel = select("lab-model", "Model:", [[4, NAMES[4]], [1, NAMES[1]]], (value) => { state.model = Number(value); update(); });
  const choosePasses = select("lab-passes", "Sleep passes N:", [1, 2, 3, 4, 5, 6, 8].map((n) => [n, n]), (value) => { state.passes = Number(value); update(); });
  choosePasses.querySelector("select").value = "4";
  const reset = el("input", { type: "checkbox", id: "lab-reset", onchange: () => { state.reset = reset.checked; update(); } });
  const button = (name, action) => el("button", { type: "button", class: "lab-button", onclick: action }, name);
  const playing = button("Play", () => play());
  let timer = null, scoring = 0;

  root.replaceChildren(
    el("div", { class: "lab-row" }, chooseModel, choosePasses, el("label", { for: "lab-reset" }, reset, " reset S before the questions")),
    el("div", { class: "lab-row" }, ...ringBoxes, button("Random rings", () => { state.rings = [randomRing(), randomRing()]; update(); })),
    el("div", { class: "lab-row lab-slide" }, playing, el("label", { for: "lab-moment" }, "Moment: "), slider),
    text, el("div", { class: "lab-row" }, "cache: ", cache), canvas, result,
    el("details", {}, el("summary", {}, "What really happens to the rings"), history),
    el("div", { class: "lab-row" }, button("Score 40 random pairs of rings", scoreMany), score),
  );

  function drawRings() {
    ringBoxes.forEach((box, r) => {
      const cells = state.rings[r].map((cell, i) => el("button", {
        type: "button", class: "lab-cell", "aria-pressed": cell === 1, "aria-label": `ring ${r + 1}, cell ${i + 1}: ${cell}`,
        onclick: () => { state.rings[r] = state.rings[r].map((old, j) => (j === i ? 1 - old : old)); update(); box.querySelectorAll("button")[i].focus(); },
      }, String(cell)));
      box.replaceChildren(`ring ${r + 1} `, ...cells);
    });
    history.replaceChildren(...state.rings.map((ring) => el("pre", {}, rollout(ring).map((row, s) => `${s} steps  ${row.join(" ")}`).join("\n"))));
  }

  // S of both fast-weight blocks, four heads each, as tables of 16 keys by 32 values.
  function drawS(S) {
    const draw = canvas.getContext("2d"), parts = S.filter((part) => part), { K, V } = models[state.model];
    draw.fillStyle = "white";
    draw.fillRect(0, 0, canvas.width, canvas.height);
    parts.forEach((part, block) => {
      for (let head = 0; head < 4; head++) {
        for (let i = 0; i < K; i++) for (let j = 0; j < V; j++) {
          const x = Math.max(-1, Math.min(1, part[(head * K + i) * V + j] / 0.6)), pale = Math.round(255 * (1 - Math.abs(x)));
          draw.fillStyle = x > 0 ? `rgb(255,${pale},${pale})` : `rgb(${pale},${pale},255)`;
          draw.fillRect(2 + head * 132 + j * 4, 2 + block * 76 + i * 4, 4, 4);
        }
      }
    });
  }

  function show(moment) {
    state.moment = moment;
    slider.value = moment;
    const { text: said, cache: tokens, S, change, answers } = state.run.moments[moment];
    text.textContent = said + (change === null ? "" : ` S changed by ${Math.round(100 * change)} % of its size.`);
    slider.setAttribute("aria-valuetext", said);
    cache.replaceChildren(...Array.from({ length: WIDTH }, (_, i) => el("span", { class: i < tokens ? "lab-full" : "" })));
    drawS(S);
    result.replaceChildren(...(answers || []).map(({ bit, p }, r) => {
      const truth = rollout(state.rings[r]).at(-1)[0];
      return el("p", { class: bit === truth ? "lab-right" : "lab-wrong" }, `Ring ${r + 1}: the model says ${bit}, with ${(100 * p).toFixed(1)} % probability. The truth is ${truth}: ${bit === truth ? "right" : "wrong"}.`);
    }));
  }

  function update() {
    pause();
    drawRings();
    state.run = run(state);
    root.dataset.logits = JSON.stringify(state.run.answers.map(({ logits }) => [...logits])); // a test reads them
    slider.max = state.run.moments.length - 1;
    show(state.run.moments.length - 1);
  }

  function pause() {
    clearInterval(timer);
    timer = null;
    playing.textContent = "Play";
  }

  function play() {
    if (timer) return pause();
    if (state.moment + 1 >= state.run.moments.length) show(0);
    timer = setInterval(() => (state.moment + 1 < state.run.moments.length ? show(state.moment + 1) : pause()), 900);
    playing.textContent = "Pause";
  }

  // In small bites, so that the page stays alive.
  function scoreMany() {
    let done = 0, right = 0;
    const mine = (scoring += 1); // a later click ends this one
    const setting = { model: state.model, passes: state.passes, reset: state.reset };
    const next = () => {
      if (mine !== scoring) return;
      const rings = [randomRing(), randomRing()], { answers } = run({ ...setting, rings });
      right += answers.every(({ bit }, r) => bit === rollout(rings[r]).at(-1)[0]) ? 1 : 0;
      done += 1;
      score.textContent = ` both answers right: ${right} of ${done} (${NAMES[setting.model]}; N = ${setting.passes}${setting.reset ? ", S reset" : ""})`;
      if (done < 40) setTimeout(next, 0);
    };
    next();
  }

  update();
  root.dataset.ready = "yes";
});
