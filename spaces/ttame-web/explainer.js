// The exported explainer in the browser: pixels in, classes and maps out. What it must know stands in explainer.json.
import * as ort from "./ort/ort.wasm.min.mjs";

ort.env.wasm.wasmPaths = new URL("./ort/", import.meta.url).href;
// Threads need SharedArrayBuffer, which a page has only when its server sends the two cross-origin headers.
ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;

/** Load the graph. `progress` is called with a share of 0 to 1. */
export async function load(progress = () => {}) {
  const facts = await (await fetchOk("explainer.json")).json();
  const response = await fetchOk("explainer.onnx");
  const total = Number(response.headers.get("Content-Length")) || 0;
  const parts = [];
  let received = 0;
  const reader = response.body.getReader();
  for (let step = await reader.read(); !step.done; step = await reader.read()) {
    parts.push(step.value);
    received += step.value.length;
    if (total) progress(Math.min(1, received / total));
  }
  const graph = new Uint8Array(await new Blob(parts).arrayBuffer());
  return { facts, session: await ort.InferenceSession.create(graph, { executionProviders: ["wasm"] }) };
}

async function fetchOk(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name} is missing (${response.status}); run build.py to make the complete folder`);
  return response;
}

/** {classes: [{id, label, score, map}], mapSize: [h, w], milliseconds} of an ImageData; each map is a Float32Array. */
export async function explain({ facts, session }, image) {
  const recipe = facts.preprocessing;
  const [h, w] = recipe.crop ?? [recipe.resize.height, recipe.resize.width];
  const pixels = new ort.Tensor("float32", prepare(image, recipe), [1, 3, h, w]);
  const begin = performance.now();
  const out = await session.run({ pixel_values: pixels });
  const milliseconds = performance.now() - begin;
  const mapSize = out.maps.dims.slice(2);
  const cells = mapSize[0] * mapSize[1];
  const classes = Array.from(out.class_ids.data, (id, n) => ({
    id: Number(id),
    label: facts.labels[Number(id)],
    score: out.scores.data[Number(id)],
    map: out.maps.data.slice(n * cells, (n + 1) * cells),
  }));
  return { classes, mapSize, milliseconds };
}

/** [width, height] of a picture after the resize and before the crop. */
function resized(width, height, recipe) {
  const edge = recipe.resize.shortest_edge;
  if (!edge) return [recipe.resize.width, recipe.resize.height];
  const other = Math.trunc((edge * Math.max(width, height)) / Math.min(width, height));
  return width <= height ? [edge, other] : [other, edge];
}

/** Pixel values, channel by channel: resized as Pillow does it, cropped in the middle, normalised. */
export function prepare(image, recipe) {
  const [width, height] = resized(image.width, image.height, recipe);
  const [cropH, cropW] = recipe.crop ?? [height, width];
  const left = (width - cropW) >> 1, top = (height - cropH) >> 1;
  const kernel = KERNELS[recipe.resample];
  if (!kernel) throw new Error(`resampling "${recipe.resample}" is not known here`);
  const across = weights(image.width, width, kernel).slice(left, left + cropW);
  const down = weights(image.height, height, kernel).slice(top, top + cropH);
  const narrow = new Uint8ClampedArray(image.height * cropW * 3); // rounds to 8 bits between the passes, as Pillow does
  for (let y = 0; y < image.height; y++) {
    for (let x = 0; x < cropW; x++) {
      const { first, taps } = across[x];
      for (let c = 0; c < 3; c++) {
        let sum = 0, at = (y * image.width + first) * 4 + c;
        for (let t = 0; t < taps.length; t++, at += 4) sum += taps[t] * image.data[at];
        narrow[(y * cropW + x) * 3 + c] = Math.floor(sum / ONE + 0.5);
      }
    }
  }
  const values = new Float32Array(3 * cropH * cropW);
  for (let y = 0; y < cropH; y++) {
    const { first, taps } = down[y];
    for (let x = 0; x < cropW; x++) {
      for (let c = 0; c < 3; c++) {
        let sum = 0, at = (first * cropW + x) * 3 + c;
        for (let t = 0; t < taps.length; t++, at += cropW * 3) sum += taps[t] * narrow[at];
        const pixel = Math.min(255, Math.max(0, Math.floor(sum / ONE + 0.5))) / 255;
        values[(c * cropH + y) * cropW + x] = (pixel - recipe.mean[c]) / recipe.std[c];
      }
    }
  }
  return values;
}

const ONE = 2 ** 22; // Pillow's weights are whole numbers of this unit; with others some pixels would be one level off
const KERNELS = {
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  bicubic: [2, (x) => {
    const a = -0.5, d = Math.abs(x);
    if (d < 1) return ((a + 2) * d - (a + 3)) * d * d + 1;
    return d < 2 ? (((d - 5) * d + 8) * d - 4) * a : 0;
  }],
};

/** Per output pixel: the first input pixel and the weights from there on; the kernel widens where the picture shrinks. */
function weights(from, to, [radius, kernel]) {
  const step = from / to, widen = Math.max(1, step), reach = radius * widen;
  return Array.from({ length: to }, (_, i) => {
    const centre = (i + 0.5) * step;
    const first = Math.max(0, Math.floor(centre - reach + 0.5)), last = Math.min(from, Math.floor(centre + reach + 0.5));
    const taps = Array.from({ length: last - first }, (_, t) => kernel((first + t - centre + 0.5) / widen));
    const sum = taps.reduce((a, b) => a + b, 0);
    return { first, taps: Float64Array.from(taps, (tap) => Math.round((tap / sum) * ONE)) };
  });
}

/** Map cells around each pixel of the picture along one axis: {seen, before, after, part}. */
function axis(length, whole, cropped, cells) {
  return Array.from({ length }, (_, i) => {
    const inside = ((i + 0.5) * whole) / length - ((whole - cropped) >> 1);
    const at = Math.min(cells - 1, Math.max(0, (inside * cells) / cropped - 0.5));
    const before = Math.floor(at);
    return { seen: inside >= 0 && inside <= cropped, before, after: Math.min(before + 1, cells - 1), part: at - before };
  });
}

/** A map at the picture's own size: Float32Array in [0, 1], -1 where the crop cut the picture away. */
export function place(map, [h, w], width, height, recipe) {
  const [wholeW, wholeH] = resized(width, height, recipe);
  const [cropH, cropW] = recipe.crop ?? [wholeH, wholeW];
  const columns = axis(width, wholeW, cropW, w), rows = axis(height, wholeH, cropH, h);
  const placed = new Float32Array(width * height);
  rows.forEach((row, y) => columns.forEach((column, x) => {
    const upper = map[row.before * w + column.before] * (1 - column.part) + map[row.before * w + column.after] * column.part;
    const lower = map[row.after * w + column.before] * (1 - column.part) + map[row.after * w + column.after] * column.part;
    placed[y * width + x] = row.seen && column.seen ? upper * (1 - row.part) + lower * row.part : -1;
  }));
  return placed;
}
