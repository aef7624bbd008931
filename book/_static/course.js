// Small repairs to the libraries of a static page, made before they load.
// Attribute data-widgets of this script: where the manager's icon font is, relative to _static.
(() => {
  const { dataset, src } = document.currentScript;
  if (dataset.widgets) {
    const folder = new URL(dataset.widgets, src).href;
    window.requirejs = { paths: { "@jupyter-widgets/html-manager/dist": folder } };
  }

  // A small diagram keeps its natural width instead of growing to that of the text: see course.css.
  const keepWidth = (svg) => {
    const natural = svg.style.maxWidth;
    if (natural.endsWith("px")) {
      svg.style.setProperty("--natural-width", natural);
    }
  };
  const drawn = () => document.querySelectorAll("pre.mermaid > svg").forEach(keepWidth);
  new MutationObserver(drawn).observe(document, { childList: true, subtree: true });

  // Widgets typeset their labels with MathJax 2's queue; the page has MathJax 3.
  const Hub = {
    Queue([, , element]) {
      mathjax.startup?.promise?.then(() => mathjax.typesetPromise([element]));
    },
  };
  let mathjax;
  Object.defineProperty(window, "MathJax", {
    configurable: true,
    get: () => mathjax,
    set: (value) => {
      mathjax = value;
      if (value) value.Hub ??= Hub;
    },
  });
})();
