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

// A formula stays on one line with the bracket before it and the comma after it.
const marks = (text, which) => text?.nodeType === Node.TEXT_NODE && text.data.match(which)?.[0] || "";
for (const formula of document.querySelectorAll("span.math")) {
  const { previousSibling: before, nextSibling: after } = formula;
  const opens = marks(before, /[(\[“‘]+$/), closes = marks(after, /^[.,:;!?)\]”’]+/);
  if (!opens && !closes) continue;
  const together = document.createElement("span");
  together.style.whiteSpace = "nowrap";
  formula.replaceWith(together);
  together.append(opens, formula, closes);
  if (opens) before.data = before.data.slice(0, -opens.length);
  if (closes) after.data = after.data.slice(closes.length);
}

// A formula that is wider than the page scrolls, by keyboard too, and fades where it goes on.
addEventListener("load", () => window.MathJax?.startup?.promise?.then(() => {
  for (const formula of document.querySelectorAll('mjx-container[display="true"]')) {
    const look = () => {
      const hidden = formula.scrollWidth - formula.clientWidth;
      if (hidden > 0) formula.tabIndex = 0; else formula.removeAttribute("tabindex");
      formula.classList.toggle("goes-on", formula.scrollLeft < hidden - 1);
    };
    formula.addEventListener("scroll", look);
    new ResizeObserver(look).observe(formula);
  }
}));
