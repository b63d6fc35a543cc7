// The histogram of a run: normal images above the line, anomalous ones below, mistakes in colour.

const BINS = 56;
const HALF = 92; // height of either half
const FOOT = 22; // and of the numbers below

class Histogram {
  constructor(run, moved) {
    this.run = run;
    this.element = draw("svg", { class: "histogram", role: "img" });
    this.most = [make("span"), make("span")]; // of either kind, in the highest bar
    this.legend = this.makeLegend();
    this.followPointer(moved);
  }

  makeLegend() {
    const known = this.run.label.some((label) => label !== null);
    const entries = known
      ? [
          ["normal", "normal, above", this.most[0]],
          ["anomalous", "anomalous, below", this.most[1]],
          ["alarm", "false alarms", ""],
          ["missed", "missed", ""],
        ]
      : [
          ["normal", "labels unknown", this.most[0]],
          ["alarm", "called anomalous", ""],
        ];
    const items = entries.map(([name, text, after]) => {
      const colour = draw("rect", { class: `bars ${name}`, width: 12, height: 12, rx: 3 });
      const sample = draw("svg", { width: 12, height: 12, "aria-hidden": "true" }, colour);
      return make("li", {}, sample, make("span", {}, text, after));
    });
    return make("ul", { className: "legend" }, ...items);
  }

  // Dragging in the histogram moves the threshold too; with a finger it scrolls, and the slider is there.
  followPointer(moved) {
    const { element } = this;
    const move = (event) => {
      const box = element.getBoundingClientRect();
      moved(between(0, (event.clientX - box.left) / box.width, 1));
    };
    element.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "touch") return;
      element.setPointerCapture(event.pointerId);
      move(event);
    });
    element.addEventListener("pointermove", (event) => {
      if (element.hasPointerCapture(event.pointerId)) move(event);
    });
  }

  draw(indices) {
    const { run } = this;
    this.width = this.element.clientWidth || 640;
    this.element.setAttribute("viewBox", `0 0 ${this.width} ${2 * HALF + FOOT}`);
    const { bins, beyond } = this.bins(indices);
    const most = [0, 1].map((label) => Math.max(1, ...bins[label].slice(0, beyond ? -1 : undefined)));
    this.most.forEach((element, label) => {
      element.textContent = ` (highest bar: ${count(most[label])})`;
    });
    const x = this.xOf(run.initial);
    this.line = draw("line", { class: "threshold", y1: 0, y2: 2 * HALF });
    this.element.replaceChildren(
      ...this.bars(bins, most),
      draw("line", { class: "axis", x1: 0, x2: this.width, y1: HALF, y2: HALF }),
      draw("line", { class: "recorded", x1: x, x2: x, y1: 0, y2: 2 * HALF }),
      this.line,
      ...this.numbers(beyond),
    );
  }

  // Bars twice: in the colour of what is right, and in that of mistakes, of which the threshold cuts off what is right.
  bars(bins, most) {
    const names = { right: `right-${this.run.index}`, left: `left-${this.run.index}` };
    this.clips = [0, 1].map(() => draw("rect", { x: 0, y: 0, height: 2 * HALF }));
    const clips = Object.values(names).map((id, i) => draw("clipPath", { id }, this.clips[i]));
    const paths = [
      ["normal", 0, {}],
      ["alarm", 0, { "clip-path": `url(#${names.right})` }],
      ["anomalous", 1, {}],
      ["missed", 1, { "clip-path": `url(#${names.left})` }],
    ].map(([name, label, clip]) => {
      const shape = barsOf(bins[label], most[label], this.width, label ? 1 : -1);
      return draw("path", { class: `bars ${name}`, d: shape, ...clip });
    });
    return [...clips, ...paths];
  }

  numbers(beyond) {
    const { low, high } = this.run;
    const y = 2 * HALF + FOOT - 6;
    const end = beyond ? this.width - 100 : this.width;
    const found = ticks(low, high, Math.max(4, Math.floor(this.width / 80)))
      .filter((tick) => this.xOf(tick) < end)
      .map((tick) => textAt(short(tick), between(14, this.xOf(tick), this.width - 14), y, "middle"));
    if (beyond) found.push(textAt(`${count(beyond)} above ${short(high)}`, this.width, y, "end"));
    return found;
  }

  // Numbers of normal and of anomalous images in each bin, and how many are beyond the last one, which has them too.
  bins(indices) {
    const { run } = this;
    const bins = { 0: new Array(BINS).fill(0), 1: new Array(BINS).fill(0) };
    let beyond = 0;
    for (const i of indices) {
      if (run.raw[i] === null) continue;
      const bin = Math.floor((BINS * (run.raw[i] - run.low)) / (run.high - run.low));
      bins[run.label[i] ?? 0][between(0, bin, BINS - 1)] += 1;
      beyond += bin >= BINS;
    }
    return { bins, beyond };
  }

  xOf(value) {
    const { low, high } = this.run;
    return between(0, (this.width * (value - low)) / (high - low), this.width);
  }

  moveLine() {
    const x = this.xOf(this.run.raised);
    const set = (element, attributes) =>
      Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
    set(this.clips[0], { x, width: Math.max(0, this.width - x) });
    set(this.clips[1], { width: x });
    set(this.line, { x1: x, x2: x });
  }
}

function barsOf(bins, most, width, direction) {
  const step = width / bins.length;
  return bins
    .map((number, i) => {
      if (!number) return "";
      const height = between(2, ((HALF - 8) * number) / most, HALF - 2);
      const [x, w] = [i * step + 0.5, Math.max(1, step - 1)];
      return `M${x.toFixed(1)} ${HALF}h${w.toFixed(1)}v${(direction * height).toFixed(1)}h${(-w).toFixed(1)}z`;
    })
    .join("");
}
