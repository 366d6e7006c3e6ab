// A map of clips that can be heard: one module for a page, a report and a Jupyter widget.
//
//   mount(el, payload, {onSelect})   draws into `el` and returns a handle, also kept as `el.explorer`
//   default.render({model, el})      the same for anywidget
//
// drawing.js precedes it in the same module. The payload is made by audiomaepp/explorer.py from files that may
// hold anything: every text enters the page as text (textContent, setAttribute), never as markup, and nothing
// is loaded from anywhere.

const MEANINGS = {
  "kNN-10": "share of the held-out clips whose ten nearest training clips vote for the right label",
  linear: "share of the held-out clips that a linear classifier of the embeddings labels correctly",
  RankMe: "number of dimensions that the embeddings make use of",
  trust: "how well the map keeps the nearest clips of the embedding, at most 1",
  "cosine distance": "0 between equal embeddings, 1 between unrelated ones",
};

let mounted = 0; // makes the names of radio groups unique

/** Draw the explorer into an element; return its handle. */
export function mount(el, payload, callbacks = {}) {
  el.explorer?.destroy();
  const data = decode(payload);
  const { n, settings, columns } = data;
  const id = `amx${++mounted}`;
  const leaving = new AbortController(); // ends every listener outside of the element
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  const state = {
    setting: data.first, previous: -1, color: columns.findIndex((c) => c.name === data.color), selected: -1, hover: -1,
    rows: [], found: null, hidden: new Set(), mode: "pan", trails: calm.matches, t: 1, steps: null,
  };
  const sounds = soundsOf(data, () => { markPlaying(); });

  // ------------------------------------------------------------------------------------------- the page
  const canvasBox = h("div", { class: "amx-layers" });
  const over = h("canvas", { class: "amx-over" });
  const tip = h("div", { class: "amx-tip", hidden: true });
  const live = h("div", { class: "amx-hidden", role: "status", "aria-live": "polite" });
  const map = h("div", {
    class: "amx-map", tabIndex: 0, role: "application",
    "aria-label": `Map of ${n} clips. Arrow keys move to the next clip, Enter or space plays it, Escape clears, plus and minus zoom.`,
  }, canvasBox, over, tip);
  const tool = (name, label, onclick, pressed) => h("button", {
    type: "button", class: "amx-tool", title: label, "aria-label": label, onclick, "data-tool": name,
    "aria-pressed": pressed,
  }, icon(ICONS[name], line));
  const modes = ["pan", "lasso", "box"].map((mode) => tool(mode,
    { pan: "Move the map", lasso: "Select with a lasso (Shift + drag)", box: "Select with a box" }[mode],
    () => setMode(mode), String(mode === "pan")));
  const tools = h("div", { class: "amx-tools", role: "toolbar", "aria-label": "Map tools" }, ...modes,
    tool("plus", "Zoom in", () => zoom(1.5)), tool("minus", "Zoom out", () => zoom(1 / 1.5)),
    tool("fit", "Show the whole map (double click)", () => fit()));
  const search = h("input", {
    type: "search", placeholder: "Search", title: "Name or label", "aria-label": "Search clips by name or label", class: "amx-search",
    autocomplete: "off", oninput: () => find(search.value),
    onkeydown: (e) => {
      if (e.key === "Enter" && state.found?.length) { choose(state.found[0], true); find(search.value = ""); map.focus(); }
      if (e.key === "Escape") find(search.value = "");
    },
  });
  const results = h("div", { class: "amx-results", hidden: true });
  const colorBy = h("select", { "aria-label": "Color by", onchange: () => setColor(Number(colorBy.value)) },
    h("option", { value: "-1" }, "one color"),
    ...columns.map((c, k) => c.kind !== "text" && h("option", { value: String(k) }, c.name)));
  const themeButton = h("button", {
    type: "button", class: "amx-tool", title: "Light or dark", "aria-label": "Light or dark", onclick: () => setTheme(dark() ? "light" : "dark"),
  }, icon(ICONS.theme, line));
  const trailBox = h("input", { type: "checkbox", checked: state.trails, onchange: () => { state.trails = trailBox.checked; fade(); } });
  const legend = h("div", { class: "amx-legend" });
  const numbers = h("div", { class: "amx-numbers" });
  const meanings = h("details", { class: "amx-meanings amx-small" });
  const card = h("section", { class: "amx-card", "aria-label": "Clip" });
  const list = h("section", { class: "amx-list", "aria-label": "Clips" });
  const facts = h("dl", { class: "amx-facts", "aria-label": "Columns of the table" });
  const strays = h("section", { class: "amx-strays", "aria-label": "Clips whose nearest clips have another label" });
  const picked = h("section", { class: "amx-picked", "aria-label": "Selection", hidden: true });
  const switches = h("div", { class: "amx-switches" });
  const root = h("div", { class: data.previews || data.links ? "amx" : "amx amx-mute" },
    h("header", {},
      h("div", { class: "amx-title" }, h("h2", {}, data.title), h("p", { class: "amx-note" }, data.note)),
      h("div", { class: "amx-controls" },
        h("div", { class: "amx-find" }, search, results),
        h("label", {}, h("span", {}, "Color"), colorBy), themeButton)),
    h("div", { class: "amx-body" },
      h("div", { class: "amx-main" }, switches, h("div", { class: "amx-stage" }, map, tools), legend),
      h("aside", { class: "amx-panel", "aria-label": "Numbers and clips" }, numbers, meanings, card, strays, list, facts, picked,
        data.sound && h("p", { class: "amx-small" }, data.sound))),
    live);
  el.replaceChildren(root);

  // ----------------------------------------------------------------------------------------------- theme
  const dark = () => getComputedStyle(root).colorScheme === "dark"
    || (getComputedStyle(root).colorScheme !== "light" && matchMedia("(prefers-color-scheme: dark)").matches);
  function setTheme(theme) {
    if (theme) root.dataset.theme = theme; else delete root.dataset.theme;
    paint();
  }
  function followHost() { // JupyterLab and VS Code say on the body whether they are dark
    const { jpThemeLight, vscodeThemeKind } = document.body.dataset;
    if (jpThemeLight) setTheme(jpThemeLight === "true" ? "light" : "dark");
    else if (vscodeThemeKind) setTheme(vscodeThemeKind.includes("light") ? "light" : "dark");
  }
  const host = new MutationObserver(followHost);
  host.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-vscode-theme-kind"] });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => paint(), { signal: leaving.signal });

  // ------------------------------------------------------------------------------------------ the picture
  let from = settings[data.first].xy;
  let to = from;
  const now = new Float32Array(2 * n); // where each point is drawn
  const looks = new Uint8Array(8 * n);
  const view = { x: 0, y: 0, scale: 1 };
  let [width, height, ratio, fitted, ink] = [1, 1, 1, 1, "#000"];
  let [ground, rim] = [[255, 255, 255], [255, 255, 255]]; // color of the page, and towards which edges are mixed
  let frame = 0;
  let glide = null; // {start, fadeFrom} while points move or trails fade
  let trail = 0;
  let clean = false; // whether the upper canvas is empty
  let renderer = makeRenderer(false);

  function makeRenderer(flat) {
    const canvas = h("canvas", { class: "amx-points" });
    canvasBox.replaceChildren(canvas);
    let made = null;
    try { made = flat ? null : webglRenderer(canvas, n); } catch (error) { console.warn("WebGL2:", error.message); }
    if (!made && !flat) return makeRenderer(true); // a canvas keeps its first kind of context
    if (!flat) canvas.addEventListener("webglcontextlost", () => { renderer = makeRenderer(true); resize(); });
    made ??= flatRenderer(canvas, n);
    made.canvas = canvas;
    made.setPositions(from, to);
    made.setLooks(looks);
    return made;
  }

  const size = () => Math.min(13, Math.max(4.5, 40 * n ** -0.2)) * Math.min(2, Math.max(1, (view.scale / fitted) ** 0.35));
  const screenX = (i) => (now[2 * i] - view.x) * view.scale + width / 2;
  const screenY = (i) => height / 2 - (now[2 * i + 1] - view.y) * view.scale;
  const shown = (i) => looks[8 * i + 3] > 0;

  /** Set color, shape and brightness of every point; then draw. */
  function paint() {
    const style = getComputedStyle(root);
    ground = (style.backgroundColor.match(/[\d.]+/g) || [255, 255, 255]).slice(0, 3).map(Number);
    ink = style.color;
    rim = dark() ? [235, 235, 245] : ground; // light edges keep dark colors visible
    const column = columns[state.color];
    const lit = state.rows.length ? new Set(state.rows) : state.found ? new Set(state.found)
      : state.selected >= 0 ? new Set([state.selected, ...neighbors(state.selected).map(([j]) => j)]) : null;
    const gray = hex(data.gray);
    const styles = data.styles.map(([color, marker]) => [hex(color), SHAPES[marker]]);
    const [low, high] = column?.kind === "number" ? range(column) : [0, 1];
    for (let i = 0; i < n; i++) {
      let [rgb, shape, hidden] = [styles[0][0], 0, false];
      if (column?.kind === "class") {
        const code = column.codes[i];
        hidden = state.hidden.has(code);
        [rgb, shape] = code === MISSING ? [gray, 0] : styles[code % styles.length];
      } else if (column?.kind === "number") {
        const at = (column.values[i] - low) / (high - low || 1);
        rgb = Number.isNaN(at) ? gray : SCALE[Math.round(255 * at)];
      }
      const alpha = hidden ? 0 : lit && !lit.has(i) ? 46 : 235;
      looks.set([...rgb, alpha, shape, data.held[i] ? 0 : 1, 0, 0], 8 * i);
    }
    renderer.setLooks(looks);
    redraw();
  }

  function range(column) {
    let [low, high] = [Infinity, -Infinity];
    for (const v of column.values) if (!Number.isNaN(v)) [low, high] = [Math.min(low, v), Math.max(high, v)];
    return [low, high];
  }

  const redraw = () => { frame ||= requestAnimationFrame(draw); };

  // While the map moves, a machine that needs more than 50 ms for a picture draws fewer points; at rest it draws all.
  let [count, last, resting] = [n, 0, 0];
  function moving() {
    clearTimeout(resting);
    resting = setTimeout(() => { resting = 0; last = 0; redraw(); }, 200);
    redraw();
  }
  function pace(time) {
    if (!resting && !glide) return n;
    const took = last ? time - last : 30;
    last = time;
    count = Math.round(took > 50 ? Math.max(Math.min(n, 4000), (count * 40) / took) : took < 25 ? Math.min(n, count * 1.3) : count);
    return count;
  }

  function draw(time) {
    frame = 0;
    if (glide) {
      const past = Math.max(0, time - glide.start); // a frame's time may lie before that of the click
      const s = glide.lasts ? Math.min(1, past / glide.lasts) : 1;
      state.t = s < 0.5 ? 4 * s ** 3 : 1 - (-2 * s + 2) ** 3 / 2;
      const left = 1 - Math.max(0, past - glide.lasts - 1200) / 1500; // trails stay a moment, then fade
      trail = Math.min(0.5, 12 / Math.sqrt(n)) * (state.trails ? 1 : Math.max(0, Math.min(1, left)));
      if (s === 1 && (state.trails || left <= 0)) { glide = null; last = 0; redraw(); }
    }
    for (let k = 0; k < 2 * n; k++) now[k] = state.t === 1 ? to[k] : from[k] + (to[k] - from[k]) * state.t;
    renderer.draw({ t: state.t, size: size(), view, ratio, ground, rim, count: pace(time), trail: state.previous >= 0 ? trail : 0 });
    drawOver();
    handle.frames++;
    if (glide) redraw();
  }

  /** Draw what is few and changes often: the chosen clip, its neighbors, the pointer's clip, the lasso. */
  function drawOver() {
    // Drawn by the processor: it is little, and Chromium without a GPU loses a picture that only clears the canvas.
    const ctx = over.getContext("2d", { willReadFrequently: true });
    const { selected, hover } = state;
    const nothing = selected < 0 && hover < 0 && sounds.playing < 0 && !drag?.path;
    if (nothing && clean) return;
    clean = nothing;
    ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
    ctx.clearRect(0, 0, width, height);
    const r = size() / 2;
    if (selected >= 0) {
      const near = neighbors(selected);
      ctx.strokeStyle = ink;
      ctx.globalAlpha = 0.35;
      ctx.lineWidth = 1;
      for (const [j] of near) if (shown(j)) {
        ctx.beginPath();
        ctx.moveTo(screenX(selected), screenY(selected));
        ctx.lineTo(screenX(j), screenY(j));
        ctx.stroke();
      }
      ctx.globalAlpha = 1;
      for (const [j] of near) if (shown(j)) mark(ctx, j, r + 1.5, 1.5);
      mark(ctx, selected, r + 3.5, 2.5);
    }
    if (hover >= 0 && hover !== selected) mark(ctx, hover, r + 2, 1.5);
    if (sounds.playing >= 0) {
      ctx.strokeStyle = ink;
      ctx.lineWidth = 1;
      ctx.beginPath();
      ctx.arc(screenX(sounds.playing), screenY(sounds.playing), r + 8, 0, 7);
      ctx.stroke();
    }
    if (drag?.path) {
      ctx.beginPath();
      drag.path.forEach(([x, y], k) => ctx[k ? "lineTo" : "moveTo"](x, y));
      ctx.closePath();
      ctx.strokeStyle = ink;
      ctx.lineWidth = 1.5;
      ctx.setLineDash([5, 4]);
      ctx.stroke();
      ctx.setLineDash([]);
      ctx.globalAlpha = 0.07;
      ctx.fillStyle = ink;
      ctx.fill();
      ctx.globalAlpha = 1;
    }
  }

  function mark(ctx, i, r, width) {
    const [red, green, blue, , shape, hollow] = looks.subarray(8 * i, 8 * i + 6);
    ctx.beginPath();
    outline(ctx, shape, screenX(i), screenY(i), r);
    ctx.fillStyle = hollow ? `rgb(${ground})` : `rgb(${red},${green},${blue})`;
    ctx.fill();
    ctx.strokeStyle = hollow ? `rgb(${red},${green},${blue})` : ink;
    ctx.lineWidth = width;
    ctx.stroke();
  }

  // ---------------------------------------------------------------------------------------------- the view
  const corners = (() => { // the rectangle that holds every map
    const box = [Infinity, Infinity, -Infinity, -Infinity];
    for (const { xy } of settings)
      for (let k = 0; k < xy.length; k++) {
        box[k % 2] = Math.min(box[k % 2], xy[k]);
        box[2 + (k % 2)] = Math.max(box[2 + (k % 2)], xy[k]);
      }
    return box;
  })();

  function fit() {
    const [left, low, right, high] = corners;
    [view.x, view.y] = [(left + right) / 2, (low + high) / 2];
    const room = Math.min(48, width / 10, height / 10);
    const top = Math.min(60, height / 4); // the tools are there
    view.scale = fitted = Math.min((width - 2 * room) / (right - left || 1e-6), (height - room - top) / (high - low || 1e-6));
    if (!Number.isFinite(view.scale) || right - left + high - low < 1e-6) view.scale = fitted = 1;
    view.y += (top - room) / 2 / view.scale;
    redraw();
  }

  function zoom(factor, x = width / 2, y = height / 2) {
    const scale = Math.min(fitted * 400, Math.max(fitted * 0.4, view.scale * factor));
    view.x += (x - width / 2) * (1 / view.scale - 1 / scale);
    view.y -= (y - height / 2) * (1 / view.scale - 1 / scale);
    view.scale = scale;
    moving();
  }

  function resize() {
    const box = map.getBoundingClientRect();
    if (!box.width || !box.height) return;
    const whole = Math.abs(view.scale - fitted) < 1e-9 * fitted;
    [width, height, ratio] = [box.width, box.height, Math.min(3, window.devicePixelRatio || 1)];
    for (const canvas of [renderer.canvas, over]) {
      canvas.width = Math.round(width * ratio);
      canvas.height = Math.round(height * ratio);
    }
    if (whole) fit();
    renderer.setPositions(from, to);
    renderer.setLooks(looks);
    redraw();
  }
  const sizes = new ResizeObserver(resize);
  sizes.observe(map);

  // ---------------------------------------------------------------------------------------------- settings
  function show(k) {
    if (k === state.setting) return;
    from = now.slice();
    to = settings[k].xy;
    [state.previous, state.setting] = [state.setting, k];
    renderer.setPositions(from, to);
    state.t = calm.matches ? 1 : 0;
    glide = { start: performance.now(), lasts: calm.matches ? 0 : 600 };
    hide();
    fillNumbers();
    markSwitches();
    paint();
    fillPanel();
    say(`Setting ${settings[k].name}`);
  }
  function fade() { glide = { start: performance.now() - 1800, lasts: 600 }; redraw(); }

  const steps = settings.map((s, k) => k).filter((k) => settings[k].step);
  const radios = settings.map((s, k) => s.step ? null : h("input", {
    type: "radio", name: id, value: String(k), checked: k === data.first, onchange: () => { halt(); show(k); },
  }));
  const slider = h("input", {
    type: "range", min: "0", max: String(Math.max(0, steps.length - 1)), step: "1", value: "0", "aria-label": "Step",
    oninput: () => { halt(); show(steps[Number(slider.value)]); },
    onclick: () => { halt(); show(steps[Number(slider.value)]); }, // back from a setting beside it, to where it stands
  });
  const stepName = h("output", { class: "amx-step" });
  const stepButton = h("button", {
    type: "button", class: "amx-tool", "aria-label": "Play the steps", title: "Play the steps of the training",
    onclick: () => (state.steps ? halt() : march()),
  }, icon(ICONS.play));
  function march() {
    let at = steps.indexOf(state.setting);
    if (at < 0 || at === steps.length - 1) at = -1;
    const next = () => { if (++at < steps.length) show(steps[at]); if (at >= steps.length - 1) halt(); };
    state.steps = setInterval(next, 1100);
    next();
    stepButton.replaceChildren(icon(state.steps ? ICONS.stop : ICONS.play));
  }
  function halt() {
    clearInterval(state.steps);
    state.steps = null;
    stepButton.replaceChildren(icon(ICONS.play));
  }
  function markSwitches() {
    radios.forEach((radio, k) => { if (radio) radio.checked = k === state.setting; });
    const at = steps.indexOf(state.setting);
    if (at >= 0) slider.value = String(at);
    stepName.textContent = at >= 0 ? settings[state.setting].name : settings[steps[Number(slider.value)]]?.name ?? "";
    slider.setAttribute("aria-valuetext", stepName.textContent);
    slider.parentElement?.classList.toggle("amx-idle", at < 0);
  }
  if (settings.length > 1) {
    const choices = settings.map((s, k) => radios[k] && h("label", { class: "amx-choice" }, radios[k],
      h("span", {}, s.name, s.baseline && h("small", {}, "baseline"))));
    if (choices.some(Boolean)) switches.append(h("fieldset", {}, h("legend", { class: "amx-hidden" }, "Setting"), ...choices.filter(Boolean)));
    if (steps.length) switches.append(h("div", { class: "amx-steps" }, stepButton, slider, stepName));
    switches.append(h("label", { class: "amx-trails", title: "Keep the lines along which the clips moved" }, trailBox, "keep trails"));
  }

  const scores = [...new Set([...settings].sort((a, b) => Object.keys(b.numbers).length - Object.keys(a.numbers).length)
    .flatMap((s) => Object.keys(s.numbers)).concat(Object.values(data.references).flatMap(Object.keys)))];
  const known = [...scores, settings.some((s) => s.near.length) && "cosine distance"].filter((name) => MEANINGS[name]);
  meanings.hidden = !known.length;
  meanings.append(h("summary", {}, "What the numbers mean"),
    h("dl", {}, ...known.flatMap((name) => [h("dt", {}, name), h("dd", {}, MEANINGS[name])])));

  function fillNumbers() {
    const current = settings[state.setting];
    const rows = [[current.name, current.numbers, "amx-current"],
      ...settings.filter((s) => s.baseline && s !== current).map((s) => [s.name, s.numbers, ""]),
      ...Object.entries(data.references).map(([name, values]) => [name, values, ""])];
    const present = new Set(rows.flatMap(([, values]) => Object.keys(values)));
    const names = scores.filter((name) => present.has(name)); // in one order, whichever setting is shown
    if (!names.length) return numbers.replaceChildren();
    numbers.replaceChildren(h("table", {},
      h("thead", {}, h("tr", {}, h("td"), ...names.map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, ...rows.map(([name, values, style]) => h("tr", { class: style },
        h("th", { scope: "row" }, name || "this map"), ...names.map((key) => h("td", {}, values[key] ?? "")))))));
  }

  // ------------------------------------------------------------------------------------------------ legend
  function setColor(k) {
    state.color = k;
    state.hidden.clear();
    colorBy.value = String(k);
    fillLegend();
    paint();
    fillPanel();
  }

  function fillLegend() {
    const column = columns[state.color];
    if (!column) return legend.replaceChildren();
    if (column.kind === "number") {
      const [low, high] = range(column);
      const bar = h("div", { class: "amx-bar" });
      bar.style.background = `linear-gradient(to right, ${VIRIDIS})`;
      return legend.replaceChildren(h("div", { class: "amx-scale" }, h("span", {}, column.name),
        h("span", {}, short(low)), bar, h("span", {}, short(high))));
    }
    const counts = new Map();
    for (const code of column.codes) counts.set(code, (counts.get(code) || 0) + 1);
    const codes = [...counts.keys()].sort((a, b) => a - b);
    const toggle = (code) => { state.hidden.has(code) ? state.hidden.delete(code) : state.hidden.add(code); refresh(); };
    const only = (code) => {
      const alone = codes.every((c) => state.hidden.has(c) === (c !== code));
      state.hidden = new Set(alone ? [] : codes.filter((c) => c !== code));
      refresh();
    };
    const refresh = () => { const at = [...legend.querySelectorAll("button")].indexOf(document.activeElement); fillLegend(); legend.querySelectorAll("button")[at]?.focus(); paint(); };
    legend.replaceChildren(...codes.map((code) => {
      const name = code === MISSING ? "unlabeled" : column.classes[code];
      const [color, marker] = code === MISSING ? [data.gray, "o"] : data.styles[code % data.styles.length];
      return h("span", { class: "amx-class" },
        h("button", { type: "button", "aria-pressed": String(!state.hidden.has(code)), title: "Hide or show this class", onclick: () => toggle(code) },
          icon(shapePath(SHAPES[marker]), { fill: color }), name, h("small", {}, String(counts.get(code)))),
        h("button", { type: "button", class: "amx-only", "aria-label": `Show only ${name}`, title: "Show only this class", onclick: () => only(code) }, "only"));
    }));
    if (state.hidden.size) legend.append(h("button", { type: "button", class: "amx-all", onclick: () => { state.hidden.clear(); refresh(); } }, "show all"));
  }

  // ------------------------------------------------------------------------------------------------- clips
  /** Return [row, cosine distance] of the nearest clips in the embedding of this setting. */
  function neighbors(i) {
    const { near, far } = settings[state.setting];
    const k = near.length / n;
    return Array.from({ length: k }, (_, j) => [near[i * k + j], far[i * k + j] / 32767]);
  }

  const labelColumn = columns.findIndex((c) => c.name === "label" && c.kind === "class");
  const classes = () => (columns[state.color]?.kind === "class" ? columns[state.color] : columns[labelColumn]);
  const label = (i) => (classes() ? cell(classes(), i) || "unlabeled" : "");
  const part = (i) => ["training clip", "held out", ""][data.held[i]]; // 2: it is not known
  const describe = (i) => [data.names[i], label(i), part(i)].filter(Boolean).join(", ");
  const say = (text) => { live.textContent = text; };

  /** Select a clip, show it in the panel, and play it. */
  function choose(i, play) {
    state.selected = i;
    if (!state.rows.length) callbacks.onSelect?.([i]);
    const focused = root.contains(document.activeElement);
    fillPanel();
    if (focused && !root.contains(document.activeElement)) map.focus({ preventScroll: true }); // its row is gone
    paint();
    say(describe(i));
    if (play) sounds.play(i);
  }

  /** Go back from a clip to the lists. */
  function leave() {
    sounds.stop();
    state.selected = -1;
    callbacks.onSelect?.(state.rows);
    fillPanel();
    paint();
  }

  function clear() {
    sounds.stop();
    [state.selected, state.found, search.value] = [-1, null, ""];
    results.hidden = true;
    setRows([]);
  }

  function setRows(rows) {
    state.rows = rows;
    if (rows.length) state.selected = -1;
    callbacks.onSelect?.(rows);
    fillPicked();
    fillPanel();
    paint();
    if (rows.length) say(`${rows.length} clips selected`);
  }

  const swatch = (i) => {
    const [r, g, b, , shape, hollow] = looks.subarray(8 * i, 8 * i + 6);
    const color = `rgb(${r},${g},${b})`;
    return icon(shapePath(shape, 6), { class: "amx-swatch", ...(hollow ? { fill: "none", stroke: color, "stroke-width": 2.5 } : { fill: color }) });
  };
  const playButton = (i) => h("button", {
    type: "button", class: "amx-play", "data-row": String(i), disabled: !sounds.has(i), "aria-label": `Play ${data.names[i]}`,
    onclick: (e) => { e.stopPropagation(); sounds.playing === i ? sounds.stop() : sounds.play(i); },
  }, icon(sounds.playing === i ? ICONS.stop : ICONS.play));
  const item = (i, note, about = label(i)) => h("li", { "data-row": String(i), onpointerenter: () => { state.hover = i; redraw(); }, onpointerleave: () => { state.hover = -1; redraw(); } },
    playButton(i), h("button", { type: "button", class: "amx-name", onclick: () => choose(i, true) }, swatch(i), h("span", {}, data.names[i]), h("small", {}, about)),
    note !== undefined && h("span", { class: "amx-far" }, note));

  function markPlaying() {
    for (const button of root.querySelectorAll("button.amx-play")) {
      const on = Number(button.dataset.row) === sounds.playing;
      button.classList.toggle("amx-on", on);
      button.replaceChildren(icon(on ? ICONS.stop : ICONS.play));
    }
    redraw();
  }

  /** Show the picture of a clip's sound in a place that may have gone when it is ready. */
  function showPicture(i, place) {
    const coming = sounds.picture(i);
    if (!coming) return false;
    coming.then((picture) => {
      if (!place.isConnected || place.dataset.row !== String(i)) return;
      [place.width, place.height] = [picture.width, picture.height];
      place.getContext("2d").drawImage(picture, 0, 0);
      place.classList.add("amx-ready");
    }, () => { place.hidden = true; });
    return true;
  }

  /** Return how far each clip moved in the last switch, as shares of the map. */
  function moved() {
    const [a, b] = [settings[state.previous].xy, settings[state.setting].xy];
    const all = Math.hypot(corners[2] - corners[0], corners[3] - corners[1]) || 1;
    return Array.from({ length: n }, (_, i) => [i, Math.hypot(b[2 * i] - a[2 * i], b[2 * i + 1] - a[2 * i + 1]) / all]);
  }

  /** Return [row, code, share] of the clips most of whose nearest clips have another label, the least fitting first. */
  function astray() {
    const codes = classes()?.codes;
    const found = [];
    if (codes) for (let i = 0; i < n; i++) {
      if (codes[i] === MISSING) continue;
      const counts = new Map([[codes[i], 0]]); // first, so that a tie is its own
      for (const [j] of neighbors(i)) if (codes[j] !== MISSING) counts.set(codes[j], (counts.get(codes[j]) ?? 0) + 1);
      const [code, most] = [...counts].reduce((best, next) => (next[1] > best[1] ? next : best));
      if (code !== codes[i]) found.push([i, code, counts.get(codes[i]) - most]);
    }
    return found.sort((a, b) => a[2] - b[2]);
  }

  function fillStrays() {
    const found = state.selected < 0 && !state.rows.length ? astray() : [];
    strays.replaceChildren(...(found.length ? [
      h("h4", {}, `Clips whose nearest clips have another ${classes().name}`, h("small", {}, `${found.length} of ${n}`)),
      h("ol", {}, ...found.slice(0, 8).map(([i, code]) => item(i, undefined, `${label(i)} among ${classes().classes[code]}`)))] : []));
  }

  function fillPanel() {
    const i = state.selected;
    fillStrays();
    facts.replaceChildren();
    if (i >= 0) {
      const picture = h("canvas", { class: "amx-picture", "data-row": String(i), role: "img", "aria-label": "Spectrogram" });
      const near = neighbors(i);
      card.replaceChildren(h("div", { class: "amx-head" }, playButton(i), h("div", {}, h("h3", {}, data.names[i]),
        h("p", {}, swatch(i), [label(i), part(i)].filter(Boolean).join(" · "))),
        tool("close", "Close this clip (Escape)", () => { leave(); map.focus({ preventScroll: true }); })), picture);
      facts.replaceChildren( ...columns.filter((c, k) => k !== labelColumn && cell(c, i) !== "").flatMap((c) => [h("dt", {}, c.name), h("dd", {}, cell(c, i))]));
      picture.hidden = !showPicture(i, picture);
      list.replaceChildren(...(near.length ? [h("h4", {}, "Nearest in the embedding", h("small", {}, "cosine distance")),
        h("ol", {}, ...near.map(([j, far]) => item(j, far.toFixed(2))))] : []));
      return;
    }
    const heard = data.previews || data.links;
    card.replaceChildren(h("p", { class: "amx-hint" }, `Click a point to ${heard ? "hear it and to " : ""}see its nearest clips.`),
      h("p", { class: "amx-small amx-keys" },
        `On the map, arrow keys go from clip to clip${heard ? ", Enter plays, and" : ", and"} Shift + drag selects clips.`));
    if (state.previous >= 0 && !state.rows.length) {
      const far = moved().sort((a, b) => b[1] - a[1]).slice(0, 10).filter(([, share]) => share > 0);
      list.replaceChildren(h("h4", {}, `Moved most from ${settings[state.previous].name}`, h("small", {}, "share of the map")),
        h("ol", {}, ...far.map(([j, share]) => item(j, `${Math.round(100 * share)}%`))));
    } else list.replaceChildren();
  }

  // --------------------------------------------------------------------------------------------- selection
  const MOST = 200; // rows in the list; the CSV has all
  function fillPicked() {
    const { rows } = state;
    picked.hidden = !rows.length;
    picked.replaceChildren(...(rows.length ? [
      h("h4", {}, `${rows.length} clips selected`),
      h("div", { class: "amx-actions" }, h("button", { type: "button", onclick: download }, "Download CSV"),
        h("button", { type: "button", onclick: () => setRows([]) }, "Clear")),
      h("ol", {}, ...rows.slice(0, MOST).map((i) => item(i))),
      h("p", { class: "amx-small", hidden: rows.length <= MOST }, `and ${rows.length - MOST} more in the CSV file`)] : []));
  }

  /** Return the selected clips as CSV; a text that a spreadsheet would run as a formula gets an apostrophe. */
  function csv() {
    const quote = (value) => `"${(/^[=+\-@\t\r]/.test(value) && Number.isNaN(Number(value)) ? `'${value}` : value).replaceAll('"', '""')}"`;
    const head = ["row", "name", "held_out", ...columns.map((c) => c.name)];
    const body = state.rows.map((i) => [String(i), data.names[i], ["0", "1", ""][data.held[i]], ...columns.map((c) => String(cell(c, i)))]);
    return [head, ...body].map((row) => row.map(quote).join(",")).join("\r\n") + "\r\n";
  }
  function download() {
    const href = URL.createObjectURL(new Blob([csv()], { type: "text/csv" }));
    h("a", { href, download: "clips.csv" }).click();
    setTimeout(() => URL.revokeObjectURL(href), 10000);
  }

  function find(text) {
    const words = text.trim().toLowerCase();
    state.found = words ? [] : null;
    if (words) for (let i = 0; i < n; i++) if (data.names[i].toLowerCase().includes(words) || label(i).toLowerCase().includes(words)) state.found.push(i);
    results.hidden = !words;
    results.replaceChildren(...(words ? [h("p", {}, `${state.found.length} clips`), h("ol", {}, ...state.found.slice(0, 12).map((i) => item(i)))] : []));
    paint();
  }

  // ------------------------------------------------------------------------------------- pointer and touch
  let drag = null; // {x, y, moved, path} of the first pointer
  const pointers = new Map();
  const at = (e) => { const box = map.getBoundingClientRect(); return [e.clientX - box.left, e.clientY - box.top]; };

  function nearest(x, y, reach) {
    let [best, found] = [reach * reach, -1];
    for (let i = 0; i < n; i++) {
      const d = (screenX(i) - x) ** 2 + (screenY(i) - y) ** 2;
      if (d < best && shown(i)) [best, found] = [d, i];
    }
    return found;
  }

  function setMode(mode) {
    state.mode = mode;
    modes.forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.tool === mode)));
    map.classList.toggle("amx-drawing", mode !== "pan");
  }

  function hide() { tip.hidden = true; state.hover = -1; }

  function hover(x, y) {
    const i = nearest(x, y, Math.max(11, size() * 0.8));
    if (i === state.hover && i >= 0) return;
    state.hover = i;
    map.classList.toggle("amx-pointing", i >= 0);
    tip.hidden = i < 0;
    redraw();
    if (i < 0) return;
    const picture = h("canvas", { class: "amx-picture", "data-row": String(i) });
    tip.replaceChildren(h("strong", {}, data.names[i]), h("span", {}, swatch(i), [label(i), data.held[i] ? "" : part(i)].filter(Boolean).join(" · ")), picture);
    picture.hidden = !showPicture(i, picture);
    const [px, py] = [screenX(i), screenY(i)];
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(width - box.width - 4, px + 14))}px`;
    tip.style.top = `${py + 14 + box.height > height ? Math.max(4, py - 14 - box.height) : py + 14}px`;
  }

  map.addEventListener("pointerdown", (e) => {
    if (e.button) return;
    map.setPointerCapture?.(e.pointerId);
    pointers.set(e.pointerId, at(e));
    const [x, y] = at(e);
    if (pointers.size === 1) {
      const drawing = e.shiftKey ? "lasso" : state.mode;
      drag = { x, y, start: [x, y], drawing, path: drawing === "pan" ? null : [[x, y]], moved: false };
    } else drag = null; // two fingers: pinch
  });
  map.addEventListener("pointermove", (e) => {
    const [x, y] = at(e);
    if (pointers.size === 2 && pointers.has(e.pointerId)) {
      const [before, other] = [pointers.get(e.pointerId), [...pointers].find(([key]) => key !== e.pointerId)[1]];
      const gap = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]) || 1;
      view.x -= (x - before[0]) / 2 / view.scale;
      view.y += (y - before[1]) / 2 / view.scale;
      zoom(gap([x, y]) / gap(before), (x + other[0]) / 2, (y + other[1]) / 2);
      pointers.set(e.pointerId, [x, y]);
      return;
    }
    if (!drag) { if (!pointers.size && e.pointerType !== "touch") hover(x, y); return; }
    pointers.set(e.pointerId, [x, y]);
    if (!drag.moved && Math.hypot(x - drag.start[0], y - drag.start[1]) < 5) return;
    drag.moved = true;
    hide();
    if (drag.drawing === "lasso") drag.path.push([x, y]);
    else if (drag.drawing === "box") drag.path = [drag.start, [x, drag.start[1]], [x, y], [drag.start[0], y]];
    else {
      view.x -= (x - drag.x) / view.scale;
      view.y += (y - drag.y) / view.scale;
    }
    [drag.x, drag.y] = [x, y];
    if (drag.path) redraw(); else moving();
  });
  const release = (e) => {
    pointers.delete(e.pointerId);
    const done = drag;
    drag = null;
    if (!done || e.type === "pointercancel") return redraw();
    if (done.moved) return done.path ? setRows(inside(done.path)) : undefined;
    const i = nearest(...done.start, e.pointerType === "touch" ? 24 : Math.max(11, size() * 0.8));
    if (i >= 0) choose(i, true);
    else redraw();
  };
  map.addEventListener("pointerup", release);
  map.addEventListener("pointercancel", release);
  map.addEventListener("pointerleave", () => { hide(); redraw(); });
  map.addEventListener("dblclick", (e) => { if (nearest(...at(e), 11) < 0) fit(); });
  map.addEventListener("wheel", (e) => { // in a notebook or a report, the wheel scrolls until the map is in use
    if (!e.ctrlKey && document.activeElement !== map && !root.closest(".amx-page")) return;
    e.preventDefault();
    const unit = [1, 16, 400][e.deltaMode] ?? 1;
    hide();
    zoom(Math.exp(-Math.max(-240, Math.min(240, e.deltaY * unit)) * (e.ctrlKey ? 0.01 : 0.0022)), ...at(e));
  }, { passive: false });

  /** Return the rows of the points inside a closed path (even-odd rule). */
  function inside(path) {
    const rows = [];
    for (let i = 0; i < n; i++) {
      if (!shown(i)) continue;
      const [x, y] = [screenX(i), screenY(i)];
      let odd = false;
      for (let a = 0, b = path.length - 1; a < path.length; b = a++) {
        const [[ax, ay], [bx, by]] = [path[a], path[b]];
        if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) odd = !odd;
      }
      if (odd) rows.push(i);
    }
    return rows;
  }

  // ---------------------------------------------------------------------------------------------- keyboard
  const DIRECTIONS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  /** Go to the nearest clip in a direction, within 45 degrees; without a clip, to the one nearest to the middle. */
  function step([dx, dy]) {
    if (state.selected < 0 || !shown(state.selected)) {
      const first = nearest(width / 2, height / 2, Infinity);
      if (first >= 0) choose(first, false);
      return;
    }
    const [x, y] = [screenX(state.selected), screenY(state.selected)];
    let [best, found] = [Infinity, -1];
    for (let i = 0; i < n; i++) {
      if (i === state.selected || !shown(i)) continue;
      const [ax, ay] = [screenX(i) - x, screenY(i) - y];
      const along = ax * dx + ay * dy;
      const aside = Math.abs(ax * dy) + Math.abs(ay * dx);
      if (along > 0.01 && aside <= along && along + aside < best) [best, found] = [along + aside, i];
    }
    if (found < 0) return;
    const [sx, sy] = [screenX(found), screenY(found)];
    if (sx < 20 || sy < 20 || sx > width - 20 || sy > height - 20) [view.x, view.y] = [now[2 * found], now[2 * found + 1]];
    choose(found, false);
  }

  map.addEventListener("keydown", (e) => {
    if (e.ctrlKey || e.metaKey || e.altKey) return;
    const { selected } = state;
    const actions = {
      Enter: () => selected >= 0 && sounds.play(selected),
      " ": () => (sounds.playing >= 0 ? sounds.stop() : selected >= 0 && sounds.play(selected)),
      Escape: clear, "+": () => zoom(1.5), "=": () => zoom(1.5), "-": () => zoom(1 / 1.5), 0: fit,
    };
    const act = DIRECTIONS[e.key] ? () => step(DIRECTIONS[e.key]) : actions[e.key];
    if (!act) return;
    e.preventDefault();
    e.stopPropagation(); // a notebook has meanings of its own for these keys
    act();
  });
  root.addEventListener("keydown", (e) => { if (e.key === "Escape" && e.target !== map) clear(); });
  root.addEventListener("focusout", (e) => { if (!e.relatedTarget || !results.parentElement.contains(e.relatedTarget)) results.hidden = true; });
  search.addEventListener("focus", () => { results.hidden = !search.value.trim(); });

  // ---------------------------------------------------------------------------------------------- the handle
  const handle = {
    state, data, sounds, view, csv, show, choose, clear, fit, setMode, setColor, setTheme, frames: 0,
    get renderer() { return renderer.kind; },
    get position() { return Array.from(now); },
    screen: (i) => { const box = map.getBoundingClientRect(); return [box.left + screenX(i), box.top + screenY(i)]; },
    neighbors,
    destroy() {
      leaving.abort();
      halt();
      clearTimeout(resting);
      sounds.stop();
      host.disconnect();
      sizes.disconnect();
      cancelAnimationFrame(frame);
      root.remove();
      delete el.explorer;
    },
  };
  el.explorer = handle;
  followHost();
  fillNumbers();
  markSwitches();
  setColor(state.color);
  resize();
  fit();
  return handle;
}

/** The widget of anywidget: the payload comes from Python, and the selected rows go back to it. */
function render({ model, el }) {
  const handle = mount(el, model.get("payload"), {
    onSelect: (rows) => { model.set("selection", rows); model.save_changes(); },
  });
  return () => handle.destroy();
}

export default { render };
