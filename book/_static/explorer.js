/* The speedup explorer of chapter 1: sliders, numbers and a curve.

   Every <div class="specref-explorer"> on a page becomes a widget; a page
   without one is left alone.  Starting values come from data-alpha,
   data-gamma, data-c, data-growth and data-knee.

   The formulas are those of specref.theory, and tests/book/test_explorer.py
   compares the two under node.  Does not handle: correlated acceptance.

   Time unit: one target pass over one token. */
(function () {
  "use strict";

  const MOST = 64; // longest chain that the search for the best one tries
  const SHOWN = 16; // longest chain on the axis and on the slider
  const KNEES = [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, Infinity];

  // Leviathan et al. 2023, Eq. 1 (the extra token included), by Horner's
  // rule: exact at alpha = 1, where the closed form is 0 / 0.
  function expectedTokens(alpha, gamma) {
    let sum = 1;
    for (let i = 0; i < gamma; i++) sum = 1 + alpha * sum;
    return sum;
  }

  // A pass over n tokens: memory-bound with a slope, then compute-bound.
  function passTime(n, growth = 0, knee = Infinity) {
    return Math.max(1 + growth * (n - 1), n / knee);
  }

  // gamma draft steps, and one pass over them and the last token.
  function roundCost(gamma, c, growth = 0, knee = Infinity) {
    return gamma * c + passTime(gamma + 1, growth, knee);
  }

  // Leviathan et al. 2023, Theorem 3.8, with a pass time that may grow.
  function speedup(alpha, gamma, c, growth = 0, knee = Infinity) {
    return expectedTokens(alpha, gamma) / roundCost(gamma, c, growth, knee);
  }

  // The shortest of the best chains of at most `most` tokens; 0 is plain.
  function optimalGamma(alpha, c, growth = 0, knee = Infinity, most = MOST) {
    let best = { gamma: 0, speedup: 1 };
    for (let gamma = 1; gamma <= most; gamma++) {
      const s = speedup(alpha, gamma, c, growth, knee);
      if (s > best.speedup * (1 + 1e-12)) best = { gamma, speedup: s };
    }
    return best;
  }

  const formulas = { expectedTokens, passTime, speedup, optimalGamma, MOST };
  if (typeof module !== "undefined" && module.exports) {
    module.exports = formulas;
  }
  if (typeof document === "undefined") return;

  /* ---- the widget ---- */

  const SVG = "http://www.w3.org/2000/svg";
  const WIDE = 360, HIGH = 220;
  const BOX = { left: 36, right: 350, top: 12, bottom: 184 };

  const CONTROLS = [
    { key: "alpha", label: "Acceptance α", min: 0, max: 1, step: 0.01,
      start: 0.7, show: (v) => v.toFixed(2) },
    { key: "gamma", label: "Draft length γ", min: 0, max: SHOWN, step: 1,
      start: 4, show: (v) => String(v) },
    { key: "c", label: "Cost of a draft step c", min: 0, max: 1, step: 0.01,
      start: 0.1, show: (v) => v.toFixed(2) },
    { key: "growth", label: "Verification: cost per extra token",
      min: 0, max: 0.5, step: 0.01, start: 0, show: (v) => v.toFixed(2) },
    { key: "knee", label: "Verification: compute-bound from",
      min: 0, max: KNEES.length - 1, step: 1, start: KNEES.length - 1,
      show: (v) => (KNEES[v] === Infinity ? "never" : KNEES[v] + " tokens") },
  ];
  const FACTS = [
    ["tokens", "Tokens per target pass"],
    ["round", "Cost of a round, in passes"],
    ["speed", "Speedup"],
    ["best", "Best γ (its speedup)"],
  ];

  function make(tag, attributes, parent, text) {
    const svg = parent && parent.namespaceURI === SVG;
    const node = svg || tag === "svg"
      ? document.createElementNS(SVG, tag) : document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      node.setAttribute(name, value);
    }
    if (text !== undefined) node.textContent = text;
    if (parent) parent.appendChild(node);
    return node;
  }

  function startOf(host, control) {
    const given = Number.parseFloat(host.dataset[control.key]);
    if (!Number.isFinite(given)) return control.start;
    if (control.key !== "knee") return given;
    const at = KNEES.findIndex((k) => k >= given);
    return at < 0 ? control.start : at;
  }

  function slider(host, form, control, id) {
    const row = make("div", { class: "sx-row" }, form);
    make("label", { for: id }, row, control.label);
    const shown = make("output", { for: id, class: "sx-value" }, row);
    const input = make("input", {
      type: "range", id, min: control.min, max: control.max,
      step: control.step, value: startOf(host, control),
    }, row);
    return { input, shown, control };
  }

  function read(sliders) {
    const state = {};
    for (const { input, shown, control } of sliders) {
      const value = Number(input.value);
      shown.textContent = control.show(value);
      input.setAttribute("aria-valuetext", control.show(value));
      state[control.key] = control.key === "knee" ? KNEES[value] : value;
    }
    return state;
  }

  function niceTop(value) {
    const step = value <= 3 ? 0.5 : value <= 6 ? 1 : value <= 12 ? 2 : 4;
    return { top: Math.max(2, Math.ceil(value / step) * step), step };
  }

  function draw(svg, state, best) {
    const values = [];
    for (let g = 0; g <= SHOWN; g++) {
      values.push(speedup(state.alpha, g, state.c, state.growth, state.knee));
    }
    const { top, step } = niceTop(Math.max(...values));
    const x = (g) => BOX.left + (g / SHOWN) * (BOX.right - BOX.left);
    const y = (s) => BOX.bottom - (s / top) * (BOX.bottom - BOX.top);
    const at = (g) => ({ cx: x(g), cy: y(values[g]) });
    svg.replaceChildren();
    make("title", {}, svg, "Speedup against draft length, from 0 to " +
      SHOWN + "; the dashed line is plain decoding");
    for (let s = 0; s <= top + 1e-9; s += step) {
      make("line", { x1: BOX.left, x2: BOX.right, y1: y(s), y2: y(s),
        class: "sx-grid" }, svg);
      make("text", { x: BOX.left - 6, y: y(s) + 4, class: "sx-tick sx-end" },
        svg, s.toFixed(step < 1 ? 1 : 0));
    }
    for (let g = 0; g <= SHOWN; g += 4) {
      make("text", { x: x(g), y: BOX.bottom + 17, class: "sx-tick" }, svg, g);
    }
    make("text", { x: x(SHOWN / 2), y: HIGH - 4, class: "sx-tick" }, svg,
      "draft length γ");
    make("text", { x: BOX.right, y: y(1) - 5, class: "sx-tick sx-end" }, svg,
      "plain decoding");
    make("line", { x1: BOX.left, x2: BOX.right, y1: y(1), y2: y(1),
      class: "sx-even" }, svg);
    make("polyline", { class: "sx-curve",
      points: values.map((s, g) => x(g) + "," + y(s)).join(" ") }, svg);
    values.forEach((_, g) =>
      make("circle", { ...at(g), r: 2.5, class: "sx-dot" }, svg));
    if (best.gamma <= SHOWN) {
      make("circle", { ...at(best.gamma), r: 8, class: "sx-best" }, svg);
    }
    make("circle", { ...at(state.gamma), r: 5, class: "sx-now" }, svg);
  }

  function sentence(state, now, best) {
    const verdict = now > 1 + 1e-9 ? "faster than" : now < 1 - 1e-9
      ? "slower than" : "as fast as";
    const advice = best.gamma === 0 ? "No draft length helps here."
      : best.gamma === MOST ? "Longer is better as far as " + MOST + "."
      : "The best draft length is " + best.gamma + ".";
    return "γ = " + state.gamma + " runs at " + now.toFixed(2) +
      " times the speed of plain decoding: " + verdict + " it. " + advice;
  }

  function build(host, number) {
    const name = "specref-explorer-" + number;
    host.replaceChildren();
    host.setAttribute("role", "group");
    host.setAttribute("aria-labelledby", name + "-title");
    make("p", { class: "sx-title", id: name + "-title" }, host,
      "Speedup explorer");
    const body = make("div", { class: "sx-body" }, host);
    const form = make("div", { class: "sx-form" }, body);
    const sliders = CONTROLS.map((control) =>
      slider(host, form, control, name + "-" + control.key));
    const reset = make("button", { type: "button", class: "sx-reset" }, form,
      "Reset");
    const view = make("div", { class: "sx-view" }, body);
    const svg = make("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img",
      class: "sx-plot" }, view);
    make("p", { class: "sx-key" }, view,
      "Speedup against draft length. Large dot: your γ. Ring: the best.");
    const list = make("dl", { class: "sx-facts" }, view);
    const facts = {};
    for (const [key, label] of FACTS) {
      const pair = make("div", {}, list);
      make("dt", {}, pair, label);
      facts[key] = make("dd", {}, pair);
    }
    const status = make("p", { class: "sx-status", role: "status",
      "aria-live": "polite" }, host);
    let timer = 0;

    function update() {
      const state = read(sliders);
      const { alpha, gamma, c, growth, knee } = state;
      const now = speedup(alpha, gamma, c, growth, knee);
      const best = optimalGamma(alpha, c, growth, knee);
      const round = roundCost(gamma, c, growth, knee);
      const edge = best.gamma === MOST ? " or more" : "";
      facts.tokens.textContent = expectedTokens(alpha, gamma).toFixed(3);
      facts.round.textContent = round.toFixed(3);
      facts.speed.textContent = now.toFixed(3);
      facts.best.textContent =
        best.gamma + edge + " (" + best.speedup.toFixed(3) + ")";
      draw(svg, state, best);
      // Spoken once a slider rests, not at each of its steps.
      clearTimeout(timer);
      timer = setTimeout(() => {
        status.textContent = sentence(state, now, best);
      }, 250);
    }

    for (const { input } of sliders) input.addEventListener("input", update);
    reset.addEventListener("click", () => {
      for (const { input, control } of sliders) {
        input.value = startOf(host, control);
      }
      update();
    });
    update();
  }

  function start() {
    document.querySelectorAll(".specref-explorer").forEach(build);
  }

  if (document.readyState === "loading") {
    document.addEventListener("DOMContentLoaded", start);
  } else {
    start();
  }
})();
