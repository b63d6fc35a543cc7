// Draws the report from the data in the page. What comes from files is set as text only, never as markup.
"use strict";

(() => {
  const FIRST = 12; // images in the gallery
  const PAGE = 48; // those that are added to it at a time
  const BINS = 56;
  const STEPS = 1000; // of the slider
  const CURVES = 8; // colours; further curves are dashed
  const SVG = "http://www.w3.org/2000/svg";

  // What can become of an image.
  const OUTCOMES = {
    missed: "Missed",
    alarm: "False alarm",
    found: "Found",
    passed: "Passed",
    flagged: "Called anomalous",
    clear: "Called normal",
    unscored: "No score",
  };
  const OUTCOMES_OF_MANY = { ...OUTCOMES, alarm: "False alarms" };

  const SORTS = {
    worst: "Worst mistakes first",
    nearest: "Nearest to the threshold",
    highest: "Highest score",
    lowest: "Lowest score",
    file: "File name",
  };

  // --- Theme: as the system has it, until the button is pressed ---

  const root = document.documentElement;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let chosen = "";

  function showTheme() {
    root.dataset.theme = chosen || (dark.matches ? "dark" : "light");
    const button = document.getElementById("theme");
    if (button) {
      button.hidden = false;
      button.textContent = root.dataset.theme === "dark" ? "☀ Light" : "☾ Dark";
      button.setAttribute("aria-label", `Switch to ${root.dataset.theme === "dark" ? "light" : "dark"} colours`);
    }
  }
  showTheme();
  dark.addEventListener("change", showTheme);

  // --- Small helpers ---

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

  // --- Runs ---

  class Run {
    constructor(data, index) {
      Object.assign(this, data, { index });
      this.size = this.path.length;
      this.scores = this.scoresOf(() => true);
      const lowest = this.scores[0] ?? 0;
      const highest = this.scores.at(-1) ?? 1;
      this.extent = highest - lowest || 1;
      // Some models call a score that equals the threshold anomalous.
      this.inclusive = this.raw.some((score, i) => score === this.rawThreshold && score !== null && this.predicted[i] === 1);
      // A decision that the recorded score does not explain, e.g. specks dropped by min_area, stays what it was.
      this.fixed = this.raw.map((score, i) => {
        const known = this.rawThreshold !== null && score !== null && this.predicted[i] !== null;
        const isNear = known && Math.abs(score - this.rawThreshold) < 1e-6 * this.extent;
        if (!known || isNear || this.predicted[i] === Number(this.isAbove(score, this.rawThreshold))) return null;
        return this.predicted[i];
      });
      this.fixedCount = this.fixed.filter((value) => value !== null).length;
      // Decisions without a threshold: it was beyond all scores.
      const unknown = this.predicted.includes(0) ? highest + 0.02 * this.extent : (lowest + highest) / 2;
      this.initial = this.rawThreshold ?? unknown;
      this.raised = this.initial;
      [this.low, this.high] = this.domain(lowest, highest);
      this.normalisation = this.knots();
    }

    // Where the histogram begins and ends. A third of it at least is for the scores of normal images and the threshold,
    // which anomalies can be many times as far away from; what is beyond is counted at the end.
    domain(lowest, highest) {
      const normal = this.scoresOf(this.label.includes(0) ? (label) => label === 0 : () => true);
      const at = (scores, part) => scores[Math.round(part * (scores.length - 1))] ?? this.initial;
      const spread = at(this.scores, 0.95) - at(this.scores, 0.05);
      const low = Math.min(Math.max(lowest, at(this.scores, 0.05) - 1.5 * spread), this.initial);
      const needed = Math.max(at(normal, 0.98), this.initial) - low;
      const high = Math.max(Math.min(highest, low + 3 * needed), this.initial);
      const margin = 0.02 * (high - low || 1);
      return [low - margin, high + margin];
    }

    scoresOf(chosen) {
      return this.raw.filter((score, i) => score !== null && chosen(this.label[i])).sort((a, b) => a - b);
    }

    // Pairs of raw and normalised scores, between which the normalised threshold is interpolated.
    knots() {
      const pairs = this.raw.map((raw, i) => [raw, this.score[i]]);
      pairs.push([this.rawThreshold, this.threshold]);
      return pairs.filter(([raw, score]) => raw !== null && score !== null).sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    }

    normalised(raw) {
      if (raw === this.rawThreshold) return this.threshold;
      const knots = this.normalisation;
      const next = knots.findIndex((knot) => knot[0] >= raw);
      if (next < 0 || (next === 0 && knots[0][0] > raw)) return null;
      if (knots[next][0] === raw) return knots[next][1];
      const [[x0, y0], [x1, y1]] = [knots[next - 1], knots[next]];
      return y0 + ((y1 - y0) * (raw - x0)) / (x1 - x0);
    }

    isAbove(score, threshold) {
      return this.inclusive ? score >= threshold : score > threshold;
    }

    outcome(i) {
      const { raw, label, fixed } = this;
      if (raw[i] === null) return "unscored";
      const flagged = fixed[i] === null ? this.isAbove(raw[i], this.raised) : fixed[i] === 1;
      if (label[i] === null) return flagged ? "flagged" : "clear";
      if (label[i]) return flagged ? "found" : "missed";
      return flagged ? "alarm" : "passed";
    }

    distance(i) {
      return Math.abs(this.raw[i] - this.raised) / this.extent;
    }

    // Numbers of outcomes at the threshold, or at another one.
    counts(indices, threshold = this.raised) {
      const before = this.raised;
      this.raised = threshold;
      const counts = Object.fromEntries(Object.keys(OUTCOMES).map((key) => [key, 0]));
      for (const i of indices) counts[this.outcome(i)] += 1;
      this.raised = before;
      return counts;
    }
  }

  // --- State ---

  let runs = [];
  let pictures = [];
  const filters = { run: "", category: "", group: "" };
  let outcome = "";
  let sort = "worst";

  const choices = { run: [], category: [], group: [] }; // that there are
  const several = (name) => choices[name].length > 1;
  const shownRuns = () => (filters.run === "" ? runs : [runs[Number(filters.run)]]);
  const inCategory = (run, i) => filters.category === "" || run.category[i] === filters.category;

  // Images that are counted: with a group, its images against all normal ones, as metrics of groups are computed.
  function counted(run) {
    const indices = [];
    for (let i = 0; i < run.size; i += 1) {
      const member = filters.group === "" || run.group[i] === filters.group || run.label[i] === 0;
      if (member && inCategory(run, i)) indices.push(i);
    }
    return indices;
  }

  function listed(run) {
    const indices = [];
    for (let i = 0; i < run.size; i += 1) {
      const member = filters.group === "" || run.group[i] === filters.group;
      if (member && inCategory(run, i)) indices.push(i);
    }
    return indices;
  }

  // --- Threshold: a panel for each run ---

  class Panel {
    constructor(run) {
      this.run = run;
      this.figures = make("dl", { className: "figures" });
      this.histogram = draw("svg", { class: "histogram", role: "img" });
      this.slider = make("input", {
        type: "range", min: 0, max: STEPS, step: 1, className: "screen", "aria-label": `Threshold of ${run.name}`,
      });
      this.input = make("input", { type: "number", step: "any", "aria-label": `Raw threshold of ${run.name}` });
      this.scale = make("span", { className: "scale" });
      this.command = make("code", { tabIndex: 0 });
      this.most = [make("span"), make("span")]; // of each kind, in the highest bar
      this.breakdown = make("div", { className: "breakdown", tabIndex: 0 });
      this.element = make("article", { className: "card panel" }, ...this.parts());
      this.slider.addEventListener("input", () => this.raise(this.valueAt(Number(this.slider.value))));
      this.input.addEventListener("change", () => {
        const value = Number(this.input.value);
        this.raise(this.input.value !== "" && Number.isFinite(value) ? value : run.raised);
      });
      this.followPointer();
    }

    parts() {
      const { run } = this;
      const reset = make("button", { type: "button", textContent: "Reset" });
      reset.addEventListener("click", () => this.raise(run.initial));
      this.reset = reset;
      const label = make("label", {}, make("span", { textContent: "Raw threshold" }), this.input);
      const buttons = make("div", { className: "buttons" });
      for (const [text, title, target] of [
        ["No misses", "The highest threshold that misses nothing of what is counted here", () => this.belowAnomalous()],
        ["No false alarms", "The lowest threshold without a false alarm among what is counted here", () => this.aboveNormal()],
      ]) {
        const button = make("button", { type: "button", textContent: text, title });
        button.addEventListener("click", () => this.raise(target() ?? run.raised));
        buttons.append(button);
      }
      buttons.append(reset);
      const copy = make("button", { type: "button", textContent: "Copy" });
      copy.addEventListener("click", () => this.copy(copy));
      const chart = make(
        "div", {}, legendOf(run, this.most), this.histogram, this.slider, make("div", { className: "settings" }, label, this.scale, buttons),
      );
      const folder = make("p", { className: "hint folder", textContent: run.folder });
      const parts = [folder, this.figures, make("div", { className: "columns" }, chart, this.breakdown)];
      if (runs.length > 1) parts.unshift(make("h3", { textContent: run.name }));
      if (run.rawThreshold === null) parts.push(note("This run recorded no threshold that is a number."));
      if (run.fixedCount) {
        const what = run.fixedCount === 1 ? "1 image has a label" : `${count(run.fixedCount)} images have labels`;
        parts.push(note(`${what} that the score alone does not explain, e.g. by min_area; the slider leaves them.`));
      }
      parts.push(make("div", { className: "command" }, this.command, copy));
      return parts;
    }

    copy(button) {
      const selection = window.getSelection();
      selection.selectAllChildren(this.command);
      const copied = navigator.clipboard ? navigator.clipboard.writeText(this.command.textContent) : Promise.reject();
      const say = (text) => {
        button.textContent = text;
        setTimeout(() => { button.textContent = "Copy"; }, 1500);
      };
      copied.then(() => say("Copied"), () => say("Selected"));
    }

    valueAt(position) {
      const { low, high, initial } = this.run;
      if (position === this.positionOf(initial)) return initial;
      return Number((low + ((high - low) * position) / STEPS).toPrecision(6));
    }

    positionOf(value) {
      const { low, high } = this.run;
      return between(0, Math.round((STEPS * (value - low)) / (high - low)), STEPS);
    }

    // Dragging in the histogram moves the threshold too; with a finger it scrolls, and the slider is there.
    followPointer() {
      const move = (event) => {
        const box = this.histogram.getBoundingClientRect();
        this.raise(this.valueAt(between(0, Math.round((STEPS * (event.clientX - box.left)) / box.width), STEPS)));
      };
      this.histogram.addEventListener("pointerdown", (event) => {
        if (event.pointerType === "touch") return;
        this.histogram.setPointerCapture(event.pointerId);
        move(event);
      });
      this.histogram.addEventListener("pointermove", (event) => {
        if (this.histogram.hasPointerCapture(event.pointerId)) move(event);
      });
    }

    free(label) {
      const { run } = this;
      return this.indices.filter((i) => run.label[i] === label && run.raw[i] !== null && run.fixed[i] === null);
    }

    // Halfway between a score and the next one, so that it does not matter which side the threshold itself is on.
    belowAnomalous() {
      const { run } = this;
      const lowest = Math.min(...this.free(1).map((i) => run.raw[i]));
      const next = run.scores.filter((score) => score < lowest).at(-1) ?? lowest - 0.02 * run.extent;
      return Number.isFinite(lowest) ? (lowest + next) / 2 : null;
    }

    aboveNormal() {
      const { run } = this;
      const highest = Math.max(...this.free(0).map((i) => run.raw[i]));
      const next = run.scores.find((score) => score > highest) ?? highest + 0.02 * run.extent;
      return Number.isFinite(highest) ? (highest + next) / 2 : null;
    }

    raise(value) {
      this.run.raised = value;
      this.show();
      thresholdMoved(this.run);
    }

    // After a filter has changed.
    count() {
      this.indices = counted(this.run);
      this.drawHistogram();
      this.show();
    }

    show() {
      const { run } = this;
      const counts = run.counts(this.indices);
      const before = run.raised === run.initial ? null : run.counts(this.indices, run.initial);
      this.figures.replaceChildren(...figuresOf(counts, before));
      const position = this.positionOf(run.raised);
      if (Number(this.slider.value) !== position) this.slider.value = position;
      this.slider.setAttribute("aria-valuetext", short(run.raised));
      this.input.value = exact(run.raised);
      const normalised = run.normalised(run.raised);
      this.scale.textContent = normalised === null ? "" : `normalised ${normalised.toFixed(3)}`;
      this.reset.disabled = run.raised === run.initial;
      const checkpoint = run.checkpoint ?? "MODEL.ckpt";
      const words = [
        "python -m anomalib_pack recalibrate", `--ckpt_path ${quoted(checkpoint)}`, `--threshold ${exact(run.raised)}`,
        "--normal DIR", "--out NEW.ckpt",
      ];
      this.command.replaceChildren(...words.flatMap((text, i) => [i ? " " : "", make("span", { textContent: text })]));
      this.showBreakdown();
      this.moveLine();
      this.histogram.setAttribute("aria-label", `Histogram of raw scores of ${run.name}: ${spoken(counts)}`);
    }

    showBreakdown() {
      const { run } = this;
      const parts = new Map();
      for (const i of this.indices) {
        const name = [several("category") ? run.category[i] : "", run.group[i]].filter(Boolean).map(plain).join(" · ") || "all images";
        if (!parts.has(name)) parts.set(name, []);
        parts.get(name).push(i);
      }
      const rows = [...parts].sort(([a], [b]) => a.localeCompare(b, "en")).map(([name, indices]) => {
        const counts = run.counts(indices);
        const anomalous = counts.missed + counts.found;
        const normal = counts.alarm + counts.passed;
        return make(
          "tr", {},
          make("th", { scope: "row", textContent: name }),
          make("td", { className: "number", textContent: count(indices.length) }),
          cellOf(anomalous ? counts.missed : null, "missed"),
          cellOf(normal ? counts.alarm : null, "alarm"),
        );
      });
      const titles = ["Group", "Images", "Missed", "False alarms"];
      const head = titles.map((text, i) => make("th", { scope: "col", className: i ? "number" : "", textContent: text }));
      const table = make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
      this.breakdown.replaceChildren(table);
    }

    drawHistogram() {
      const { run } = this;
      const [width, half, foot] = [this.histogram.clientWidth || 640, 92, 22];
      this.width = width;
      const height = 2 * half + foot;
      this.histogram.setAttribute("viewBox", `0 0 ${width} ${height}`);
      const { bins, beyond } = this.bins();
      const most = [0, 1].map((label) => Math.max(1, ...bins[label].slice(0, beyond ? -1 : undefined)));
      const right = `right-${run.index}`;
      const left = `left-${run.index}`;
      this.clips = [draw("rect", { x: 0, y: 0, height }), draw("rect", { x: 0, y: 0, height })];
      this.line = draw("line", { class: "threshold", y1: 0, y2: 2 * half });
      const x = this.xOf(run.initial);
      const last = beyond ? textAt(`${count(beyond)} above ${short(run.high)}`, width, height - 6, "end") : "";
      const end = beyond ? width - 100 : width;
      this.histogram.replaceChildren(
        draw("clipPath", { id: right }, this.clips[0]),
        draw("clipPath", { id: left }, this.clips[1]),
        ...[["normal", 0, null], ["alarm", 0, right], ["anomalous", 1, null], ["missed", 1, left]].map(
          ([name, label, clip]) => draw("path", {
            class: `bars ${name}`,
            d: barsOf(bins[label], most[label], width, half, label ? 1 : -1),
            ...(clip ? { "clip-path": `url(#${clip})` } : {}),
          }),
        ),
        draw("line", { class: "axis", x1: 0, x2: width, y1: half, y2: half }),
        draw("line", { class: "recorded", x1: x, x2: x, y1: 0, y2: 2 * half }),
        this.line,
        ...ticks(run.low, run.high, Math.max(4, Math.floor(width / 80)))
          .filter((tick) => this.xOf(tick) < end)
          .map((tick) => textAt(short(tick), between(14, this.xOf(tick), width - 14), height - 6, "middle")),
        last,
      );
      this.most.forEach((element, label) => { element.textContent = ` (highest bar: ${count(most[label])})`; });
    }

    // Numbers of normal and of anomalous images in each bin, and how many are beyond the last one, which has them too.
    bins() {
      const { run } = this;
      const bins = { 0: new Array(BINS).fill(0), 1: new Array(BINS).fill(0) };
      let beyond = 0;
      for (const i of this.indices) {
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
      this.clips[0].setAttribute("x", x);
      this.clips[0].setAttribute("width", Math.max(0, this.width - x));
      this.clips[1].setAttribute("width", x);
      this.line.setAttribute("x1", x);
      this.line.setAttribute("x2", x);
    }
  }

  function quoted(text) {
    return /^[\w./:\\-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
  }

  function note(text) {
    return make("p", { className: "note", textContent: text });
  }

  function textAt(text, x, y, anchor) {
    const element = draw("text", { x, y, "text-anchor": anchor });
    element.textContent = text;
    return element;
  }

  function cellOf(value, kind) {
    const className = value ? `number bad ${kind}` : "number";
    return make("td", { className, textContent: value === null ? "" : count(value) });
  }

  function legendOf(run, most) {
    const known = run.label.some((label) => label !== null);
    const entries = known
      ? [["normal", "normal, above", most[0]], ["anomalous", "anomalous, below", most[1]], ["alarm", "false alarms"], ["missed", "missed"]]
      : [["normal", "labels unknown", most[0]], ["alarm", "called anomalous"]];
    return make("ul", { className: "legend" }, ...entries.map(([name, text, after = ""]) => make(
      "li", {},
      draw("svg", { width: 12, height: 12, "aria-hidden": "true" }, draw("rect", { class: `bars ${name}`, width: 12, height: 12, rx: 3 })),
      make("span", {}, text, after),
    )));
  }

  function figuresOf(counts, before) {
    const anomalous = counts.missed + counts.found;
    const normal = counts.alarm + counts.passed;
    const right = (of) => share(of.found + of.passed, anomalous + normal);
    const figures = [];
    const add = (kind, title, value, of, earlier) => figures.push(make(
      "div", { className: `figure ${kind}` },
      make("dt", { textContent: title }),
      make("dd", { className: "value", textContent: value }),
      make("dd", { className: "of", textContent: before ? `${of}, was ${earlier(before)}` : of }),
    ));
    if (anomalous + normal) {
      add("missed", "Missed", count(counts.missed), `of ${count(anomalous)} anomalous`, (of) => count(of.missed));
      add("alarm", "False alarms", count(counts.alarm), `of ${count(normal)} normal`, (of) => count(of.alarm));
      add("accuracy", "Accuracy", right(counts), `of ${count(anomalous + normal)} images`, right);
    }
    if (counts.flagged + counts.clear) {
      const unknown = `of ${count(counts.flagged + counts.clear)} without label`;
      add("alarm", "Called anomalous", count(counts.flagged), unknown, (of) => count(of.flagged));
    }
    return figures;
  }

  function spoken(counts) {
    return Object.keys(OUTCOMES).filter((key) => counts[key]).map((key) => `${counts[key]} ${OUTCOMES[key].toLowerCase()}`).join(", ");
  }

  function barsOf(bins, most, width, half, direction) {
    const step = width / bins.length;
    return bins.map((number, i) => {
      if (!number) return "";
      const height = between(2, ((half - 8) * number) / most, half - 2);
      const [x, w] = [i * step + 0.5, Math.max(1, step - 1)];
      return `M${x.toFixed(1)} ${half}h${w.toFixed(1)}v${(direction * height).toFixed(1)}h${(-w).toFixed(1)}z`;
    }).join("");
  }

  function ticks(low, high, most) {
    const rough = (high - low) / most;
    const unit = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((factor) => factor * unit).find((size) => size >= rough);
    const found = [];
    for (let tick = Math.ceil(low / step) * step; tick <= high; tick += step) found.push(Math.round(tick / step) * step);
    return found;
  }

  // --- Curves ---

  // Corners of both curves: at each distinct score, what is above it.
  function cornersOf(run, indices) {
    const scored = indices.filter((i) => run.raw[i] !== null && run.label[i] !== null).sort((a, b) => run.raw[b] - run.raw[a]);
    const anomalous = scored.filter((i) => run.label[i]).length;
    const normal = scored.length - anomalous;
    const corners = [[0, 0]];
    let [alarms, found] = [0, 0];
    scored.forEach((i, position) => {
      if (run.label[i]) found += 1;
      else alarms += 1;
      const next = scored[position + 1];
      if (next === undefined || run.raw[next] !== run.raw[i]) corners.push([alarms, found]);
    });
    return { corners, anomalous, normal };
  }

  // Each kind: its title, axes, what it needs, the area under it, and where a corner lies.
  const KINDS = [
    {
      title: "ROC", across: "false alarms among normal images", up: "found among anomalous images", area: "AUROC",
      exists: ({ anomalous, normal }) => anomalous && normal,
      points: ({ corners, anomalous, normal }) => corners.map(([alarms, found]) => [alarms / normal, found / anomalous]),
      areaOf: (points) => points.slice(1).reduce((sum, [x, y], i) => sum + ((x - points[i][0]) * (y + points[i][1])) / 2, 0),
      at: (counts) => [counts.alarm / (counts.alarm + counts.passed), counts.found / (counts.found + counts.missed)],
    },
    {
      title: "Precision and recall", across: "recall: found among anomalous images",
      up: "precision: anomalous among called so", area: "AP",
      exists: ({ anomalous }) => anomalous,
      points: ({ corners, anomalous }) => corners.slice(1).map(([alarms, found]) => [found / anomalous, found / (found + alarms)]),
      areaOf: (points) => points.reduce((sum, [x, y], i) => sum + (x - (i ? points[i - 1][0] : 0)) * y, 0),
      at: (counts) => [
        counts.found / (counts.found + counts.missed),
        counts.found + counts.alarm ? counts.found / (counts.found + counts.alarm) : 1,
      ],
    },
  ];

  const PLOT = { size: 320, left: 52, top: 10, bottom: 46, right: 14 };
  const plotX = (x) => PLOT.left + x * PLOT.size;
  const plotY = (y) => PLOT.top + (1 - y) * PLOT.size;
  let points = new Map(); // circles of each run

  function drawCurves() {
    points = new Map();
    const drawn = KINDS.map((kind) => {
      const plot = draw("svg", {
        class: "plot", role: "img", "aria-label": kind.title,
        viewBox: `0 0 ${PLOT.left + PLOT.size + PLOT.right} ${PLOT.top + PLOT.size + PLOT.bottom}`,
      });
      for (const tick of [0, 0.25, 0.5, 0.75, 1]) {
        plot.append(
          draw("line", { class: "axis", x1: plotX(0), x2: plotX(1), y1: plotY(tick), y2: plotY(tick) }),
          draw("line", { class: "axis", x1: plotX(tick), x2: plotX(tick), y1: plotY(0), y2: plotY(1) }),
          textAt(String(tick), plotX(0) - 8, plotY(tick) + 4, "end"),
          textAt(String(tick), plotX(tick), plotY(0) + 17, "middle"),
        );
      }
      const up = textAt(kind.up, -plotY(0.5), 12, "middle");
      up.setAttribute("transform", "rotate(-90)");
      plot.append(textAt(kind.across, plotX(0.5), plotY(0) + 38, "middle"), up);
      const legend = make("ul", { className: "legend" });
      for (const run of shownRuns()) drawCurve(kind, run, plot, legend);
      if (!legend.children.length) {
        legend.append(make("li", { textContent: "Needs images with labels of both kinds, which the filters leave none of." }));
      }
      return make("div", { className: "card" }, make("h3", { textContent: kind.title }), legend, plot);
    });
    byId("plots").replaceChildren(...drawn);
    for (const run of shownRuns()) movePoints(run);
  }

  function drawCurve(kind, run, plot, legend) {
    const found = cornersOf(run, panels[run.index].indices);
    if (!kind.exists(found)) return;
    const corners = kind.points(found);
    const look = `curve-${run.index % CURVES}${run.index < CURVES ? "" : " dashed"}`;
    plot.append(draw("path", { class: look, d: pathOf(corners) }));
    const circle = draw("circle", { class: `point ${look.split(" ")[0]}`, r: 5 });
    plot.append(circle);
    if (!points.has(run)) points.set(run, []);
    points.get(run).push([kind, circle]);
    legend.append(make(
      "li", {},
      draw("svg", { width: 22, height: 12, class: "plot", "aria-hidden": "true" }, draw("path", { class: look, d: "M0 6H22" })),
      `${runs.length > 1 ? `${run.name}: ` : ""}${kind.area} ${kind.areaOf(corners).toFixed(3)}`,
    ));
  }

  // A path without the corners that nobody could see.
  function pathOf(corners) {
    let [lastX, lastY] = [-9, -9];
    return corners.map(([x, y], i) => {
      const [px, py] = [plotX(x), plotY(y)];
      if (i < corners.length - 1 && Math.abs(px - lastX) + Math.abs(py - lastY) < 0.4) return "";
      [lastX, lastY] = [px, py];
      return `${i ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`;
    }).join("");
  }

  function movePoints(run) {
    for (const [kind, circle] of points.get(run) ?? []) {
      const [x, y] = kind.at(run.counts(panels[run.index].indices));
      circle.setAttribute("cx", plotX(x));
      circle.setAttribute("cy", plotY(y));
    }
  }

  // --- Images ---

  let found = []; // what the filters leave, in order: [run, index]
  let shown = 0;

  function order() {
    const all = [];
    const numbers = Object.fromEntries(Object.keys(OUTCOMES).map((key) => [key, 0]));
    for (const run of shownRuns()) {
      for (const i of listed(run)) {
        const what = run.outcome(i);
        numbers[what] += 1;
        if (outcome === "" || outcome === what) all.push({ run, i, what });
      }
    }
    const keys = {
      worst: ({ run, i, what }) => rank(what, run.distance(i)),
      nearest: ({ run, i, what }) => (what === "unscored" ? Infinity : run.distance(i)),
      highest: ({ run, i }) => -(run.raw[i] ?? -Infinity),
      lowest: ({ run, i }) => run.raw[i] ?? Infinity,
    };
    if (sort === "file") {
      all.sort((a, b) => a.run.path[a.i].localeCompare(b.run.path[b.i], "en", { numeric: true }) || a.run.index - b.run.index);
    } else {
      for (const each of all) each.key = keys[sort](each);
      all.sort((a, b) => a.key - b.key || a.run.index - b.run.index || a.i - b.i);
    }
    found = all;
    showOutcomes(numbers);
  }

  // Mistakes that are far from the threshold, then whatever is near to it.
  function rank(what, distance) {
    if (what === "unscored") return Infinity;
    return what === "missed" || what === "alarm" ? -1 - distance : distance;
  }

  function showOutcomes(numbers) {
    const total = Object.values(numbers).reduce((sum, number) => sum + number, 0);
    const buttons = byId("gallery-bar").querySelectorAll(".outcomes button");
    for (const button of buttons) {
      const key = button.dataset.outcome;
      const number = key === "" ? total : numbers[key];
      button.textContent = `${key === "" ? "All" : OUTCOMES_OF_MANY[key]} ${count(number)}`;
      button.hidden = key !== "" && !number && !["missed", "alarm"].includes(key) && key !== outcome;
      button.setAttribute("aria-pressed", String(key === outcome));
    }
  }

  function showGallery() {
    order();
    shown = 0;
    byId("gallery").replaceChildren();
    showMore();
  }

  function showMore() {
    const next = found.slice(shown, shown + (shown ? PAGE : FIRST));
    byId("gallery").append(...next.map((each, position) => itemOf(each, shown + position)));
    shown += next.length;
    const rest = found.length - shown;
    byId("more").hidden = !rest;
    byId("more").textContent = `Show ${count(Math.min(PAGE, rest))} more of ${count(found.length)}`;
    byId("status").textContent = found.length
      ? `${count(shown)} of ${count(found.length)} images, ${SORTS[sort].toLowerCase()}`
      : "No image passes the filters.";
  }

  function pictureOf({ run, i }) {
    const index = run.picture[i];
    if (index === null) return null;
    const [width, height, content] = pictures[index];
    return make("img", {
      loading: "lazy", decoding: "async", width, height, alt: `Picture of ${fileName(run.path[i])}`,
      src: `data:image/webp;base64,${content}`,
    });
  }

  function badgeOf(what) {
    return make("span", { className: `badge ${what}`, textContent: OUTCOMES[what] });
  }

  function signed(number) {
    return `${number < 0 ? "−" : "+"}${short(Math.abs(number))}`;
  }

  function itemOf(each, position) {
    const { run, i, what } = each;
    const gap = run.raw[i] === null ? "" : ` (${signed(run.raw[i] - run.raised)})`;
    const about = [several("category") ? run.category[i] : "", run.explanation[i], several("run") ? run.name : ""].filter(Boolean).map(plain);
    const text = make(
      "span", { className: "text" },
      badgeOf(what),
      make("span", { className: "score", textContent: `score ${short(run.raw[i])}${gap}` }),
      make("span", { className: "file", textContent: [fileName(run.path[i]), ...about].join(" · ") }),
    );
    const button = make("button", { type: "button", className: "item" }, text);
    const picture = pictureOf(each);
    if (picture) button.prepend(picture);
    button.addEventListener("click", () => view(position));
    return make("li", {}, button);
  }

  // --- One image, large ---

  let viewed = 0;

  function view(position) {
    viewed = between(0, position, found.length - 1);
    const each = found[viewed];
    const { run, i, what } = each;
    const step = (text, label, by) => {
      const button = make("button", { type: "button", textContent: text, "aria-label": label });
      button.disabled = !found[viewed + by];
      button.addEventListener("click", () => view(viewed + by));
      return button;
    };
    const close = make("button", { type: "button", textContent: "Close" });
    close.addEventListener("click", () => viewer.close());
    const title = make("h2", { id: "viewer-title", textContent: fileName(run.path[i]) });
    const bar = make("div", { className: "viewer-bar" }, title, step("←", "Image before", -1), step("→", "Next image", 1), close);
    const properties = make("dl", { className: "properties" });
    for (const [name, value] of propertiesOf(run, i, what)) {
      if (value !== "" && value !== null) properties.append(make("dt", { textContent: name }), make("dd", {}, value));
    }
    const picture = pictureOf(each);
    if (picture) {
      picture.loading = "eager";
      picture.classList.toggle("small", picture.height < 256);
      picture.classList.toggle("wide", picture.width > 2 * picture.height);
    }
    const frame = make("div", { className: "frame", tabIndex: picture ? 0 : -1 }, ...(picture ? [picture] : []));
    const viewer = byId("viewer");
    const focused = viewer.contains(document.activeElement) ? document.activeElement.textContent : "";
    viewer.replaceChildren(bar, frame, properties);
    if (!viewer.open) viewer.showModal();
    const again = [...bar.querySelectorAll("button:enabled")].find((button) => button.textContent === focused);
    (again ?? close).focus();
  }

  function propertiesOf(run, i, what) {
    const label = { 0: "normal", 1: "anomalous" }[run.label[i]] ?? "";
    return [
      ["Outcome", badgeOf(what)],
      ["Raw score", run.raw[i] === null ? "none" : exact(run.raw[i])],
      ["Raw threshold", exact(run.raised)],
      ["Normalised score", short(run.score[i])],
      ["Label", label],
      ["Explanation", plain(run.explanation[i])],
      ["Category", run.category[i]],
      ["Group", plain(run.group[i])],
      ["Run", runs.length > 1 ? run.name : ""],
      ["Image file", run.path[i]],
      ["Picture of the run", run.drawn[i]],
    ];
  }

  // --- What happens when ---

  let panels = [];
  let waiting = 0;

  function thresholdMoved(run) {
    movePoints(run);
    clearTimeout(waiting);
    waiting = setTimeout(showGallery, 120); // pictures follow when the slider rests
    const numbers = Object.fromEntries(Object.keys(OUTCOMES).map((key) => [key, 0]));
    for (const each of shownRuns()) {
      for (const [key, number] of Object.entries(each.counts(listed(each)))) numbers[key] += number;
    }
    showOutcomes(numbers);
  }

  function filtersChanged() {
    byId("panels").replaceChildren(...shownRuns().map((run) => panels[run.index].element));
    for (const run of shownRuns()) panels[run.index].count();
    drawCurves();
    showGallery();
  }

  function findChoices() {
    choices.run = runs.map((run) => [String(run.index), run.name]);
    for (const name of ["category", "group"]) {
      const values = new Set(runs.flatMap((run) => run[name]));
      values.delete("");
      choices[name] = [...values].sort().map((value) => [value, plain(value)]);
    }
  }

  function makeFilters() {
    for (const [name, options] of Object.entries(choices)) {
      if (!several(name)) continue;
      const label = name[0].toUpperCase() + name.slice(1);
      const all = ["", { run: "all runs", category: "all categories", group: "all groups" }[name]];
      byId("filters").append(selectOf(label, [all, ...options], "", (value) => {
        filters[name] = value;
        filtersChanged();
      }));
    }
  }

  function makeGalleryBar() {
    const buttons = ["", ...Object.keys(OUTCOMES)].map((key) => {
      const button = make("button", { type: "button" });
      button.dataset.outcome = key;
      button.addEventListener("click", () => {
        outcome = key;
        showGallery();
      });
      return button;
    });
    const outcomes = make("div", { className: "outcomes", role: "group", "aria-label": "Outcome" }, ...buttons);
    byId("gallery-bar").append(outcomes, selectOf("Sort", Object.entries(SORTS), sort, (value) => {
      sort = value;
      showGallery();
    }));
    byId("more").addEventListener("click", () => {
      const first = shown;
      showMore();
      byId("gallery").children[first]?.querySelector("button").focus();
    });
  }

  function makeViewer() {
    const viewer = byId("viewer");
    viewer.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (by && found[viewed + by]) view(viewed + by);
    });
    viewer.addEventListener("click", (event) => {
      if (event.target === viewer) viewer.close(); // beside it
    });
    viewer.addEventListener("close", () => byId("gallery").children[viewed]?.querySelector("button").focus());
  }

  // As wide as the typical picture needs.
  function fitColumns() {
    const ratios = pictures.map(([width, height]) => width / height).sort((a, b) => a - b);
    const ratio = ratios[Math.floor(ratios.length / 2)] ?? 2.5;
    byId("gallery").style.setProperty("--column", `${Math.round(between(170, 100 * ratio, 380))}px`);
  }

  function start() {
    showTheme();
    byId("theme").addEventListener("click", () => {
      chosen = root.dataset.theme === "dark" ? "light" : "dark";
      showTheme();
    });
    runs = JSON.parse(byId("data").textContent).map((data, index) => new Run(data, index));
    pictures = JSON.parse(byId("pictures").textContent);
    panels = runs.map((run) => new Panel(run));
    fitColumns();
    findChoices();
    makeFilters();
    makeGalleryBar();
    makeViewer();
    filtersChanged();
    let width = window.innerWidth;
    window.addEventListener("resize", () => {
      if (window.innerWidth === width) return;
      width = window.innerWidth;
      for (const run of shownRuns()) panels[run.index].count();
    });
    root.dataset.ready = "";
  }

  document.addEventListener("DOMContentLoaded", start);
})();
