// Loaded before the vendored scripts, so that they work together without a network.
// Font Awesome's mutation observer would rewrite the icons of widget buttons while they are drawn.
window.FontAwesomeConfig = { observeMutations: false };
// The widgets' html-manager speaks MathJax 2; the pages carry MathJax 3.
window.addEventListener("load", () => {
  const mathjax = window.MathJax;
  if (!mathjax || !mathjax.typesetPromise || mathjax.Hub) return;
  mathjax.Hub = {
    Config() {},
    Configured() {},
    Queue(job) {
      const node = Array.isArray(job) ? job[2] : undefined;
      return mathjax.startup.promise.then(() => mathjax.typesetPromise(node ? [node] : undefined));
    },
  };
});
