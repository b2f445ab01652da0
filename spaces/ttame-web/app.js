import { explain, load, place } from "./explainer.js";

const COLOURS = [[36, 23, 99], [43, 99, 227], [38, 190, 214], [108, 226, 106], [240, 216, 58], [239, 107, 36], [158, 22, 16]];
const MOST_BYTES = 50e6, LONGEST_SIDE = 2048, MOST_ASPECT = 100;
const $ = (id) => document.getElementById(id);
const state = { model: null, failure: null, image: null, result: null, shown: 0, name: "picture" };
let turn = 0; // a newer picture overtakes one that is still being computed

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
  if (bad) $("status").scrollIntoView({ block: "nearest" });
}

const loading = load((share) => say(`Loading the explainer … ${Math.round(100 * share)} %`))
  .then((model) => {
    state.model = model;
    document.body.dataset.ready = "true";
    say("Ready. Choose a picture.");
  })
  .catch((error) => {
    state.failure = `The explainer cannot be loaded: ${error.message}`;
    say(state.failure, true);
  });

/** The picture's pixels, upright, at most LONGEST_SIDE; errors are sentences for the visitor. */
async function open(blob) {
  if (!blob.size) throw new Error("This file is empty.");
  if (blob.size > MOST_BYTES) throw new Error(`This file has ${Math.round(blob.size / 1e6)} MB; up to 50 MB are opened.`);
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { imageOrientation: "from-image" });
  } catch {
    throw new Error("This file is not a picture that your browser can open. JPEG, PNG, WebP and GIF work.");
  }
  const { width, height } = bitmap;
  if (Math.max(width, height) > MOST_ASPECT * Math.min(width, height)) {
    throw new Error(`This picture is ${width} x ${height}: too thin to classify. Crop it.`);
  }
  const shrink = Math.min(1, LONGEST_SIDE / Math.max(width, height));
  const canvas = new OffscreenCanvas(Math.max(1, Math.round(width * shrink)), Math.max(1, Math.round(height * shrink)));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "black"; // what is transparent
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

async function show(blob, name) {
  const mine = ++turn;
  delete document.body.dataset.shown;
  try {
    const image = await open(blob);
    if (!state.model && !state.failure) say("Waiting for the explainer …");
    await loading;
    if (mine !== turn) return;
    if (state.failure) throw new Error(state.failure);
    say("Computing …");
    await new Promise((resolve) => setTimeout(resolve)); // let the browser draw that
    const result = await explain(state.model, image);
    if (mine !== turn) return;
    Object.assign(state, { image, result, shown: 0, name: name.replace(/\.\w+$/, "") || "picture" });
    say(`One pass of ${Math.round(result.milliseconds)} ms gave the classes and their ${result.classes.length} maps.`);
    $("result").hidden = false;
    list();
    draw();
  } catch (error) {
    if (mine === turn) say(error.message, true);
  }
}

function list() {
  $("classes").replaceChildren(...state.result.classes.map(({ label, score }, n) => {
    const button = document.createElement("button");
    button.type = "button";
    const bar = Object.assign(document.createElement("progress"), { max: 1, value: score, ariaHidden: "true" });
    const name = Object.assign(document.createElement("span"), { textContent: label.split(",")[0], title: label });
    const share = Object.assign(document.createElement("span"), { textContent: `${(100 * score).toFixed(1)} %` });
    button.append(bar, name, share);
    button.addEventListener("click", () => {
      state.shown = n;
      draw();
    });
    return button;
  }));
}

function draw() {
  const { image, result, shown, model } = state;
  if (!result) return;
  const { width, height } = image;
  const chosen = result.classes[shown];
  chosen.placed ??= place(chosen.map, result.mapSize, width, height, model.facts.preprocessing);
  const strength = $("strength").value / 100;
  const blend = new ImageData(width, height);
  const from = image.data, to = blend.data;
  for (let i = 0; i < chosen.placed.length; i++) {
    const value = chosen.placed[i], p = 4 * i;
    if (value < 0) {
      to[p] = to[p + 1] = to[p + 2] = (from[p] + from[p + 1] + from[p + 2]) / 6 + 64;
    } else {
      const position = Math.min(1, value) * (COLOURS.length - 1);
      const low = Math.min(Math.floor(position), COLOURS.length - 2), part = position - low;
      for (let c = 0; c < 3; c++) {
        const colour = COLOURS[low][c] * (1 - part) + COLOURS[low + 1][c] * part;
        to[p + c] = (1 - strength) * from[p + c] + strength * colour;
      }
    }
    to[p + 3] = 255;
  }
  const canvas = $("canvas");
  Object.assign(canvas, { width, height });
  canvas.getContext("2d").putImageData(blend, 0, 0);
  canvas.setAttribute("aria-label", `The picture with the map of ${chosen.label}`);
  [...$("classes").children].forEach((button, n) => button.setAttribute("aria-pressed", String(n === shown)));
  document.body.dataset.shown = chosen.id;
}

async function example(name) {
  const response = await fetch(`photographs/${name}.jpg`);
  if (response.ok) show(await response.blob(), `${name}.jpg`);
  else say(`The photograph ${name} is missing; run build.py to make the complete folder.`, true);
}

$("file").addEventListener("change", ({ target }) => {
  if (target.files[0]) show(target.files[0], target.files[0].name);
  target.value = ""; // the same file may be chosen again
});
$("examples").addEventListener("click", ({ target }) => {
  const button = target.closest("button");
  if (button) example(button.dataset.name);
});
for (const [type, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", over);
    if (type !== "drop") return;
    const file = event.dataTransfer.files[0];
    if (file) show(file, file.name);
    else say("Drop a picture file: a link would have to be fetched, and this page connects to nothing.", true);
  });
}
document.addEventListener("paste", ({ clipboardData }) => {
  const file = [...clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file) show(file, file.name || "pasted");
  else say("The clipboard holds no picture.", true);
});
$("strength").addEventListener("input", draw);
$("download").addEventListener("click", () => {
  $("canvas").toBlob((blob) => {
    const url = URL.createObjectURL(blob);
    const label = state.result.classes[state.shown].label.split(",")[0].replace(/\W+/g, "_");
    Object.assign(document.createElement("a"), { href: url, download: `${state.name}_${label}.png` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }, "image/png");
});
