// Elements, numbers and names. What comes from files is set as text only, never as markup.

const SVG = "http://www.w3.org/2000/svg";

const byId = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "scope") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const count = (number) => number.toLocaleString("en");
const short = (number) => (number === null ? "–" : String(Number(number.toPrecision(4))));
const exact = (number) => String(Number(number.toPrecision(9))); // a float32 in full
const share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)} %` : "–");
const plain = (name) => name.replaceAll("_", " ");
const fileName = (path) => path.split(/[\\/]/).slice(-2).join("/");
const between = (low, value, high) => Math.min(Math.max(value, low), high);

function selectOf(label, options, value, changed) {
  const select = make("select", { name: label.toLowerCase() });
  for (const [key, text] of options) select.append(make("option", { value: key, textContent: text }));
  select.value = value;
  select.addEventListener("change", () => changed(select.value));
  return make("label", {}, make("span", { textContent: label }), select);
}

function buttonOf(text, pressed) {
  const button = make("button", { type: "button", textContent: text });
  button.addEventListener("click", pressed);
  return button;
}

function textAt(text, x, y, anchor) {
  const element = draw("text", { x, y, "text-anchor": anchor });
  element.textContent = text;
  return element;
}

// Round numbers between two, at most so many.
function ticks(low, high, most) {
  const rough = (high - low) / most;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * unit).find((size) => size >= rough);
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high; i += 1) found.push(i * step);
  return found;
}
