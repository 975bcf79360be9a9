// The moving picture of the home page: one recorded run (data/chapters/intro.json), moment by moment.
"use strict";

document.addEventListener("DOMContentLoaded", () => {
  const root = document.getElementById("nap");
  if (!root) return;
  const { tokens, labels, passes, steps, shape: [blocks, H, K, V], levels, moments } = NAP;
  const width = tokens.length / labels.length, percent = (p) => `${(Math.floor(1000 * p) / 10).toFixed(1)} %`;
  const quiet = matchMedia("(prefers-reduced-motion: reduce)");

  // The frames: what is said, which tokens are lit, how many notes the cache holds, S, what it would answer.
  const frames = [{ said: "Nothing is read yet. The cache is empty, and S is zero.", cache: 0, S: null, lit: [0, 0], wait: 1500 }];
  let ring = 0;
  for (const { kind, cache, S, change, number, woken } of moments) {
    const start = ring * width, whole = kind === "pass";
    const said = whole
      ? `Nap on window ${ring + 1}, pass ${number} of ${passes}: the window is gone over again. S changes by ${Math.round(100 * change)} % of its size.`
      : `Window ${ring + 1} is read, token by token: pass 1 of ${passes}. Each token leaves a note in the cache and writes into S.`;
    // Only after the second window has the model met both rings that it will be asked about.
    const answers = ring === labels.length - 1 ? woken : undefined;
    frames.push({ said, cache, S, answers, lit: [whole ? start : start + cache - 1, start + cache], wait: whole ? 2200 : number ? 1500 : 350 });
    if (number === passes) {
      frames.push({ said: `The cache is emptied. All that is left of window ${ring + 1} is in S.`, cache: 0, S, answers, lit: [0, 0], wait: 2200 });
      ring += 1;
    }
  }
  const { S, answers } = frames.at(-1), verdict = answers.map((p, r) => (p > 0.5) === (labels[r] === 1));
  const told = answers.map((p, r) => `${p > 0.5 ? 1 : 0} with ${percent(Math.max(p, 1 - p))}, ${verdict[r] ? "right" : "wrong"}`);
  frames.push({ said: `Awake, and asked in one pass what the first cell of each window is after ${steps} steps of Rule 110. The model says: ${told.join("; ")}.`, cache: 0, S, answers, lit: [0, 0], asked: true, wait: 0 });

  // The page: rows of boxes, S as a picture, bars, and the controls.
  const el = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };
  const boxes = tokens.map((token) => el("span", {}, String(token)));
  const rings = labels.map((_, r) => el("div", { class: "nap-row" }, el("b", {}, `window ${r + 1}`), ...boxes.slice(r * width, (r + 1) * width)));
  const notes = Array.from({ length: width }, () => el("i"));
  const canvas = el("canvas", { width: H * (V + 2) - 2, height: blocks * (K + 2) - 2 });
  const bars = labels.map((label, r) => el("div", { class: "nap-row" }, el("b", {}, `window ${r + 1}`), el("div", { class: "nap-bar" }, el("div")), el("span", { class: "nap-share" })));
  const asked = el("p");
  const stage = el("div", { class: "nap-stage", role: "img", "aria-label": root.dataset.alt },
    ...rings, el("div", { class: "nap-row nap-cache" }, el("b", {}, "cache"), ...notes),
    el("p", {}, `fast weights S: ${blocks} blocks, ${H} heads each (red +, blue −)`), canvas, asked, ...bars);
  const button = el("button", { type: "button" });
  const slider = el("input", { type: "range", min: 0, max: frames.length - 1, id: "nap-moment", autocomplete: "off" });
  const text = el("p", { class: "nap-said" });
  root.replaceChildren(text, stage, el("div", { class: "nap-controls" }, button, el("label", { for: "nap-moment" }, "Moment"), slider));

  let at = 0, timer = null;
  function show(moment) {
    at = moment;
    const { said, cache, S, lit, answers, asked: awake } = frames[at];
    text.textContent = said;
    slider.value = at;
    slider.setAttribute("aria-valuetext", said);
    boxes.forEach((box, i) => box.classList.toggle("nap-lit", lit[0] <= i && i < lit[1]));
    notes.forEach((note, i) => note.classList.toggle("nap-full", i < cache));
    drawS(S);
    asked.textContent = awake ? "right answer:" : "right answer, if it woke now:";
    bars.forEach((bar, r) => {
      const right = answers && (labels[r] ? answers[r] : 1 - answers[r]);
      bar.querySelector(".nap-bar div").style.width = answers ? `${100 * right}%` : 0;
      bar.querySelector(".nap-share").textContent = answers ? percent(right) : "–";
    });
  }

  // One pixel a number, in the colours of the chapters: red for positive, blue for negative, clear for zero in both themes.
  function drawS(S) {
    const draw = canvas.getContext("2d"), image = draw.createImageData(canvas.width, canvas.height);
    for (let n = 0; S && n < S.length; n++) {
      const head = Math.floor(n / (K * V)) % H, block = Math.floor(n / (H * K * V)), i = Math.floor(n / V) % K, j = n % V;
      const x = (S.charCodeAt(n) - 35) / levels - 1; // "#" is -1
      image.data.set([...(x > 0 ? [222, 74, 40] : [46, 134, 222]), 255 * Math.abs(x)], 4 * ((block * (K + 2) + i) * canvas.width + head * (V + 2) + j));
    }
    draw.putImageData(image, 0, 0);
  }

  function pause() {
    clearTimeout(timer);
    timer = null;
    button.textContent = "Play";
  }
  function play() {
    if (at === frames.length - 1) show(0);
    button.textContent = "Pause";
    const next = () => {
      show(at + 1);
      if (at === frames.length - 1) pause();
      else timer = setTimeout(next, frames[at].wait);
    };
    timer = setTimeout(next, frames[at].wait);
  }
  button.addEventListener("click", () => (timer ? pause() : play()));
  slider.addEventListener("input", () => {
    pause();
    show(Number(slider.value));
  });
  quiet.addEventListener("change", () => quiet.matches && pause());

  // It plays once, when it comes into view; who wants less motion gets its last moment, standing still.
  show(quiet.matches ? frames.length - 1 : 0);
  pause();
  if (quiet.matches) return;
  const seen = new IntersectionObserver(([entry]) => {
    if (!entry.isIntersecting) return;
    seen.disconnect();
    if (at === 0 && !timer) play();
  }, { threshold: 0.6 });
  seen.observe(stage);
});
