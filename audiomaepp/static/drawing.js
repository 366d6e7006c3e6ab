// The parts of the explorer: elements, data, colors, the two renderers, spectrograms and sound.
// explorer.js follows in the same module: audiomaepp/explorer.py puts one after the other.

// ---------------------------------------------------------------------------------------------- elements

/** Return an element with properties, attributes, listeners (`onclick`) and children; text stays text. */
function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key === "class") node.className = value;
    else if (key in node && !key.startsWith("aria")) node[key] = value;
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const SVG = "http://www.w3.org/2000/svg";

/** Return a small picture of a path, drawn on a grid of 20 x 20. */
function icon(path, props = {}) {
  const svg = document.createElementNS(SVG, "svg");
  const line = document.createElementNS(SVG, "path");
  line.setAttribute("d", path);
  const { fill, ...attributes } = props;
  if (fill) svg.style.fill = fill; // an attribute is weaker than the style sheet
  for (const [key, value] of Object.entries({ viewBox: "0 0 20 20", "aria-hidden": "true", ...attributes }))
    svg.setAttribute(key, value);
  svg.append(line);
  return svg;
}

const ICONS = {
  play: "M6 3.5v13l11-6.5z",
  stop: "M5 5h10v10H5z",
  pan: "M10 2v16M2 10h16M7.5 4.5 10 2l2.5 2.5M7.5 15.5 10 18l2.5-2.5M4.5 7.5 2 10l2.5 2.5M15.5 7.5 18 10l-2.5 2.5",
  lasso: "M5.5 15.5c-1.600-3-3-6-1-8.500s8-4 11.500-1 1.500 7-2.500 8.500-7 .5-7.500-1.500 2-2.500 3.500-1-.5 5-3.500 6",
  box: "M3 3h4M9 3h2M13 3h4v4M17 9v2M17 13v4h-4M11 17h-2M7 17H3v-4M3 11V9M3 7V3",
  fit: "M3 7V3h4M13 3h4v4M17 13v4h-4M7 17H3v-4",
  plus: "M10 4v12M4 10h12",
  minus: "M4 10h12",
  close: "M5 5l10 10M15 5 5 15",
  theme: "M10 3a7 7 0 1 0 0 14zM10 3a7 7 0 0 1 0 14",
};
const line = { class: "amx-line" };

// ------------------------------------------------------------------------------------------------- data

/** Return the typed array of a base64 text. */
function array(text, Type) {
  if (!text) return new Type(0);
  if (Uint8Array.fromBase64) return new Type(Uint8Array.fromBase64(text).buffer);
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new Type(bytes.buffer);
}

const MISSING = 65535; // code of a clip without a class

/** Return the payload with its arrays decoded. */
function decode(payload) {
  const wide = payload.n > 65535 ? Uint32Array : Uint16Array;
  const settings = payload.settings.map((s) => ({
    ...s,
    xy: array(s.xy, Float32Array),
    near: array(s.neighbors, wide),
    far: array(s.distances, Uint16Array), // cosine distance x 32767
  }));
  const columns = payload.columns.map((c) => {
    if (c.kind === "class") return { ...c, codes: array(c.codes, Uint16Array) };
    if (c.kind === "number") return { ...c, values: array(c.values, Float32Array) };
    return c;
  });
  return { first: 0, ...payload, settings, columns, held: array(payload.held, Uint8Array) };
}

/** Return a number with three significant digits. */
function short(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  return Number.isInteger(value) && size < 1e6 ? String(value) : size && (size < 1e-3 || size >= 1e6)
    ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

/** Return what a column says about a clip, "" where it says nothing. */
function cell(column, i) {
  if (column.kind === "class") return column.codes[i] === MISSING ? "" : column.classes[column.codes[i]];
  if (column.kind === "number") return Number.isNaN(column.values[i]) ? "" : short(column.values[i]);
  return column.values[i] ?? "";
}

// ------------------------------------------------------------------------------------------------ colors

const hex = (color) => [1, 3, 5].map((k) => parseInt(color.slice(k, k + 2), 16));
const VIRIDIS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];
const MAGMA = ["#000004", "#1d1147", "#51127c", "#822681", "#b63679", "#e65164", "#fb8861", "#fec287", "#fcfdbf"];

/** Return 256 colors between the given ones. */
function ramp(colors) {
  const ends = colors.map(hex);
  return Array.from({ length: 256 }, (_, k) => {
    const at = (k / 255) * (ends.length - 1);
    const low = Math.min(Math.floor(at), ends.length - 2);
    return ends[low].map((v, c) => Math.round(v + (ends[low + 1][c] - v) * (at - low)));
  });
}
const SCALE = ramp(VIRIDIS);
const HEAT = ramp(MAGMA);

// The five shapes, as paths around (0, 0) with radius r; the shaders draw the same ones.
const SHAPES = { o: 0, "^": 1, s: 2, D: 3, v: 4 };

/** Add the outline of a shape to a path. */
function outline(path, shape, x, y, r) {
  if (shape === 0) {
    path.moveTo(x + r * 0.88, y);
    path.arc(x, y, r * 0.88, 0, 7);
    return;
  }
  const corners = [
    null,
    [[0, -1.05], [0.98, 0.72], [-0.98, 0.72]],
    [[-0.8, -0.8], [0.8, -0.8], [0.8, 0.8], [-0.8, 0.8]],
    [[0, -1.1], [1.1, 0], [0, 1.1], [-1.1, 0]],
    [[0, 1.05], [0.98, -0.72], [-0.98, -0.72]],
  ][shape];
  corners.forEach(([a, b], k) => path[k ? "lineTo" : "moveTo"](x + a * r, y + b * r));
  path.closePath();
}

const round1 = (v) => Math.round(v * 10) / 10;

/** Return the outline of a shape as an SVG path in the middle of 20 x 20. */
function shapePath(shape, r = 7) {
  if (shape === 0) return `M${10 - r * 0.88} 10a${r * 0.88} ${r * 0.88} 0 1 0 ${r * 1.76} 0a${r * 0.88} ${r * 0.88} 0 1 0 ${-r * 1.76} 0z`;
  const parts = [];
  outline({ moveTo: (x, y) => parts.push(`M${round1(x)} ${round1(y)}`), lineTo: (x, y) => parts.push(`L${round1(x)} ${round1(y)}`),
    closePath: () => parts.push("z") }, shape, 10, 10, r);
  return parts.join("");
}

// --------------------------------------------------------------------------------------------- renderers
// A renderer draws all points once: `setPositions(from, to)`, `setLooks(looks)` when they change, and
// `draw({t, size, view, ratio, ground, rim, trail, count})` for each picture. `looks` holds 8 bytes for each point:
// red, green, blue, alpha, shape, hollow, and two unused ones. Points are drawn in a shuffled order: no class always
// lies on top of the others, and the first `count` points are a fair sample while a slow machine moves the map.

/** Return the rows 0 … n - 1 shuffled, the same way each time. */
function shuffled(n) {
  const order = Uint32Array.from({ length: n }, (_, i) => i);
  for (let i = n - 1, seed = 1; i > 0; i--) {
    seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
    const j = Math.floor((seed / 2 ** 32) * (i + 1));
    [order[i], order[j]] = [order[j], order[i]];
  }
  return order;
}

const POINT_VERTEX = `#version 300 es
in vec2 from; in vec2 to; in vec4 color; in vec4 look;
uniform float t, size; uniform vec4 view;
out vec4 tint; flat out int shape; flat out float hollow;
void main() {
  tint = color; shape = int(look.x * 255.0 + 0.5); hollow = look.y * 255.0; gl_PointSize = size + 3.0;
  gl_Position = color.a > 0.0 ? vec4(mix(from, to, t) * view.xy + view.zw, 0.0, 1.0) : vec4(9.0, 9.0, 9.0, 1.0);
}`;

const POINT_FRAGMENT = `#version 300 es
precision highp float;
in vec4 tint; flat in int shape; flat in float hollow;
uniform float size; uniform vec3 ground, rim;
out vec4 pixel;
void main() {
  float r = size * 0.5;
  vec2 q = (gl_PointCoord - 0.5) * (size + 3.0); // pixels from the middle, y down
  if (shape == 4) q.y = -q.y;
  float d = length(q) - 0.88 * r; // pixels outside of the shape
  if (shape == 1 || shape == 4) d = max(dot(vec2(abs(q.x), q.y), vec2(0.875, -0.485)) - 0.51 * r, q.y - 0.72 * r);
  if (shape == 2) d = max(abs(q.x), abs(q.y)) - 0.8 * r;
  if (shape == 3) d = (abs(q.x) + abs(q.y) - 1.1 * r) * 0.7071;
  float inside = clamp(0.5 - d, 0.0, 1.0);
  float edge = max(1.0, size * 0.09);
  float onEdge = clamp(d + edge + 0.5, 0.0, 1.0);
  vec3 fill = hollow > 0.5 ? ground : tint.rgb;
  vec3 line = hollow > 0.5 ? tint.rgb : mix(tint.rgb, rim, 0.6 * smoothstep(4.0, 9.0, size)); // none on small points
  float alpha = inside * tint.a * (hollow > 0.5 ? mix(0.55, 1.0, onEdge) : 1.0);
  pixel = vec4(mix(fill, line, hollow > 0.5 ? clamp(d + edge * 1.6 + 0.5, 0.0, 1.0) : onEdge) * alpha, alpha);
}`;

const TRAIL_VERTEX = `#version 300 es
in vec2 from; in vec2 to; in vec4 color;
uniform float t, strength; uniform vec4 view;
out vec4 tint;
void main() {
  bool start = gl_VertexID == 0;
  tint = vec4(color.rgb, color.a * strength * (start ? 0.15 : 1.0)); // fades towards the old place
  gl_Position = color.a > 0.0 ? vec4((start ? from : mix(from, to, t)) * view.xy + view.zw, 0.0, 1.0)
                              : vec4(9.0, 9.0, 9.0, 1.0);
}`;

const TRAIL_FRAGMENT = `#version 300 es
precision highp float;
in vec4 tint; out vec4 pixel;
void main() { pixel = vec4(tint.rgb * tint.a, tint.a); }`;

/** Return a WebGL2 renderer, or null where the browser has none. */
function webglRenderer(canvas, n) {
  const gl = canvas.getContext("webgl2", { antialias: false });
  if (!gl) return null;
  const names = ["from", "to", "color", "look"];
  const build = (vertex, fragment) => {
    const program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, vertex], [gl.FRAGMENT_SHADER, fragment]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    names.forEach((name, k) => gl.bindAttribLocation(program, k, name));
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program) || "shader");
    return { program, at: (name) => gl.getUniformLocation(program, name) };
  };
  const points = build(POINT_VERTEX, POINT_FRAGMENT);
  const trails = build(TRAIL_VERTEX, TRAIL_FRAGMENT);
  const buffers = { from: gl.createBuffer(), to: gl.createBuffer(), looks: gl.createBuffer() };
  const order = gl.createBuffer();
  const fill = (buffer, data) => {
    gl.bindBuffer(gl.ARRAY_BUFFER, buffer);
    gl.bufferData(gl.ARRAY_BUFFER, data, gl.DYNAMIC_DRAW);
  };
  const layout = (each) => { // the same buffers serve points (one vertex each) and trails (one instance each)
    const vertexArray = gl.createVertexArray();
    gl.bindVertexArray(vertexArray);
    [["from", 2, gl.FLOAT, false, 0, 0], ["to", 2, gl.FLOAT, false, 0, 0],
      ["looks", 4, gl.UNSIGNED_BYTE, true, 8, 0], ["looks", 4, gl.UNSIGNED_BYTE, true, 8, 4]].forEach(([buffer, ...how], k) => {
      gl.bindBuffer(gl.ARRAY_BUFFER, buffers[buffer]);
      gl.enableVertexAttribArray(k);
      gl.vertexAttribPointer(k, ...how);
      gl.vertexAttribDivisor(k, each);
    });
    return vertexArray;
  };
  const asPoints = layout(0);
  gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, order);
  gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, shuffled(n), gl.STATIC_DRAW);
  const asTrails = layout(1);
  gl.enable(gl.BLEND);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  return {
    kind: "webgl2",
    setPositions(from, to) { fill(buffers.from, from); fill(buffers.to, to); },
    setLooks(looks) { fill(buffers.looks, looks); },
    draw({ t, size, view, ratio, ground, rim, trail, count }) {
      const { width, height } = canvas;
      const place = [(2 * view.scale * ratio) / width, (2 * view.scale * ratio) / height];
      place.push(-view.x * place[0], -view.y * place[1]);
      gl.viewport(0, 0, width, height);
      gl.clearColor(0, 0, 0, 0);
      gl.clear(gl.COLOR_BUFFER_BIT);
      if (trail > 0) {
        gl.useProgram(trails.program);
        gl.bindVertexArray(asTrails);
        gl.uniform4fv(trails.at("view"), place);
        gl.uniform1f(trails.at("t"), t);
        gl.uniform1f(trails.at("strength"), trail);
        gl.drawArraysInstanced(gl.LINES, 0, 2, count);
      }
      gl.useProgram(points.program);
      gl.bindVertexArray(asPoints);
      gl.uniform4fv(points.at("view"), place);
      gl.uniform1f(points.at("t"), t);
      gl.uniform1f(points.at("size"), size * ratio);
      gl.uniform3fv(points.at("ground"), ground.map((v) => v / 255));
      gl.uniform3fv(points.at("rim"), rim.map((v) => v / 255));
      gl.drawElements(gl.POINTS, count, gl.UNSIGNED_INT, 0);
    },
  };
}

/** Return a renderer for canvas 2D: the same picture, slower. */
function flatRenderer(canvas, n) {
  const ctx = canvas.getContext("2d");
  const order = shuffled(n);
  let from, to, looks;
  return {
    kind: "2d",
    setPositions(a, b) { [from, to] = [a, b]; },
    setLooks(bytes) { looks = bytes; },
    draw({ t, size, view, ratio, ground, rim, trail, count }) {
      const { width, height } = canvas;
      ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
      ctx.clearRect(0, 0, width, height);
      const [cx, cy] = [width / ratio / 2, height / ratio / 2];
      const x = (v) => (v - view.x) * view.scale + cx;
      const y = (v) => cy - (v - view.y) * view.scale;
      const [paper, border] = [`rgb(${ground})`, `rgb(${rim})`];
      for (const i of order.subarray(0, count)) {
        const [r, g, b, a, shape, hollow] = looks.subarray(8 * i, 8 * i + 6);
        if (!a) continue;
        const at = [0, 1].map((k) => from[2 * i + k] + (to[2 * i + k] - from[2 * i + k]) * t);
        if (trail > 0) {
          ctx.globalAlpha = (a / 255) * trail;
          ctx.strokeStyle = `rgb(${r},${g},${b})`;
          ctx.lineWidth = 1;
          ctx.beginPath();
          ctx.moveTo(x(from[2 * i]), y(from[2 * i + 1]));
          ctx.lineTo(x(at[0]), y(at[1]));
          ctx.stroke();
        }
        ctx.globalAlpha = a / 255;
        ctx.beginPath();
        outline(ctx, shape, x(at[0]), y(at[1]), size / 2);
        ctx.fillStyle = hollow ? paper : `rgb(${r},${g},${b})`;
        ctx.strokeStyle = hollow ? `rgb(${r},${g},${b})` : border;
        ctx.lineWidth = hollow ? 1.4 : 0.6;
        ctx.fill();
        ctx.stroke();
      }
      ctx.globalAlpha = 1;
    },
  };
}

// --------------------------------------------------------------------------------------------- spectrogram

/** Replace a signal (re, im) by its Fourier transform; its length is a power of two. */
function fft(re, im) {
  const n = re.length;
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) [re[i], re[j], im[i], im[j]] = [re[j], re[i], im[j], im[i]];
  }
  for (let size = 2; size <= n; size *= 2) {
    for (let k = 0; k < size / 2; k++) {
      const [c, s] = [Math.cos((-2 * Math.PI * k) / size), Math.sin((-2 * Math.PI * k) / size)];
      for (let i = k; i < n; i += size) {
        const j = i + size / 2;
        const [a, b] = [re[j] * c - im[j] * s, re[j] * s + im[j] * c];
        [re[j], im[j], re[i], im[i]] = [re[i] - a, im[i] - b, re[i] + a, im[i] + b];
      }
    }
  }
}

const RATE = 16000;

/** Return a canvas with the log-frequency spectrogram of samples at 16 kHz: time to the right, low at the bottom. */
function spectrogram(samples, columns = 220, rows = 72) {
  const size = 512;
  const edge = (row) => (60 * Math.pow(7800 / 60, row / rows) * size) / RATE; // bin of the lower end of a row
  const level = new Float32Array(columns * rows);
  for (let c = 0; c < columns; c++) {
    const start = Math.round((c / columns) * samples.length - size / 2);
    const re = new Float32Array(size);
    const im = new Float32Array(size);
    for (let k = 0; k < size; k++) re[k] = (samples[start + k] || 0) * (0.5 - 0.5 * Math.cos((2 * Math.PI * k) / size));
    fft(re, im);
    for (let r = 0; r < rows; r++) {
      let power = 1e-9;
      for (let b = Math.floor(edge(r)); b <= Math.max(Math.floor(edge(r)), Math.ceil(edge(r + 1)) - 1); b++)
        power = Math.max(power, re[b] * re[b] + im[b] * im[b]);
      level[r * columns + c] = 10 * Math.log10(power);
    }
  }
  const top = level.reduce((a, b) => Math.max(a, b), -90);
  const canvas = h("canvas", { width: columns, height: rows });
  const image = new ImageData(columns, rows);
  level.forEach((db, k) => { // 60 dB below the loudest is black
    const at = 4 * ((rows - 1 - Math.floor(k / columns)) * columns + (k % columns));
    image.data.set([...HEAT[Math.round(255 * Math.max(0, 1 + (db - top) / 60))], 255], at);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

// -------------------------------------------------------------------------------------------------- sound

/** Return what plays the previews and draws their spectrograms. */
function soundsOf(data, changed) {
  const audio = new Audio();
  const pictures = new Map(); // clip → promise of a canvas, the 400 latest
  let playing = -1;
  const source = (i) => (data.previews?.[i] ? `data:${data.mime};base64,${data.previews[i]}` : data.links?.[i] || null);
  const set = (i) => { if (playing !== i) { playing = i; changed(i); } };
  audio.addEventListener("ended", () => set(-1));
  audio.addEventListener("error", () => set(-1));
  async function picture(i) {
    const bytes = array(data.previews[i], Uint8Array);
    const decoded = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(bytes.buffer);
    return spectrogram(decoded.getChannelData(0));
  }
  return {
    audio,
    get playing() { return playing; },
    has: (i) => source(i) !== null,
    play(i) {
      if (source(i) === null) return;
      audio.src = source(i);
      set(i);
      audio.play().catch((error) => { if (error.name !== "AbortError" && playing === i) set(-1); });
    },
    stop() { audio.pause(); set(-1); },
    /** Return the promise of the clip's spectrogram, or null without a preview. */
    picture(i) {
      if (!data.previews?.[i] || typeof OfflineAudioContext === "undefined") return null;
      if (!pictures.has(i)) {
        pictures.set(i, picture(i));
        if (pictures.size > 400) pictures.delete(pictures.keys().next().value);
      }
      return pictures.get(i);
    },
  };
}
