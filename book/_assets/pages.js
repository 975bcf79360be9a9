// Folded cells and answers are opened for the printer and closed again afterwards.
let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  opened.forEach((part) => { part.open = true; });
});
addEventListener("afterprint", () => opened.forEach((part) => { part.open = false; }));

// The arrow beside a chapter with pages under it has a picture and no words; a screen reader needs some.
for (const arrow of document.querySelectorAll(".bd-sidebar-primary summary")) {
  const chapter = arrow.closest("li").querySelector("a");
  arrow.setAttribute("aria-label", `Pages under ${chapter.textContent.trim()}`);
}

// The works of a list of references are its items; their role of old is no child of a list.
for (const work of document.querySelectorAll('.citation[role="doc-biblioentry"]')) work.setAttribute("role", "listitem");

// A formula that is wider than the page scrolls, by keyboard too.
addEventListener("load", () => window.MathJax?.startup?.promise?.then(() => {
  for (const formula of document.querySelectorAll('mjx-container[display="true"]')) {
    if (formula.scrollWidth > formula.clientWidth) formula.tabIndex = 0;
  }
}));
