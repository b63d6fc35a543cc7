// The threshold: a panel for each run, with its slider, and what becomes of the images.

const STEPS = 1000; // of the slider

class Panel {
  constructor(run) {
    this.run = run;
    this.figures = make("dl", { className: "figures" });
    this.histogram = new Histogram(run, (part) => this.raise(this.valueAt(Math.round(STEPS * part))));
    this.slider = make("input", {
      type: "range",
      min: 0,
      max: STEPS,
      step: 1,
      className: "screen",
      "aria-label": `Threshold of ${run.name}`,
    });
    this.slider.addEventListener("input", () => this.raise(this.valueAt(Number(this.slider.value))));
    this.input = make("input", { type: "number", step: "any", "aria-label": `Raw threshold of ${run.name}` });
    this.input.addEventListener("change", () => {
      const value = Number(this.input.value);
      this.raise(this.input.value !== "" && Number.isFinite(value) ? value : run.raised);
    });
    this.scale = make("span", { className: "scale" });
    this.reset = buttonOf("Reset", () => this.raise(run.initial));
    this.command = make("code", { tabIndex: 0 });
    this.breakdown = make("div", { className: "breakdown", tabIndex: 0 });
    this.element = make("article", { className: "card panel" }, ...this.parts());
  }

  parts() {
    const { run } = this;
    const chart = [this.histogram.legend, this.histogram.element, this.slider, this.settings()];
    const copy = buttonOf("Copy", () => copyText(this.command, copy));
    const parts = [
      make("p", { className: "hint folder", textContent: run.folder }),
      this.figures,
      make("div", { className: "columns" }, make("div", {}, ...chart), this.breakdown),
      ...this.notes(),
      make("div", { className: "command" }, this.command, copy),
    ];
    return several("run") ? [make("h3", { textContent: run.name }), ...parts] : parts;
  }

  settings() {
    const zeroMissed = buttonOf("No misses", () => this.raise(this.belowAnomalous() ?? this.run.raised));
    zeroMissed.title = "The highest threshold that misses nothing of what is counted here";
    const zeroAlarms = buttonOf("No false alarms", () => this.raise(this.aboveNormal() ?? this.run.raised));
    zeroAlarms.title = "The lowest threshold without a false alarm among what is counted here";
    const label = make("label", {}, make("span", { textContent: "Raw threshold" }), this.input);
    const buttons = make("div", { className: "buttons" }, zeroMissed, zeroAlarms, this.reset);
    return make("div", { className: "settings" }, label, this.scale, buttons);
  }

  notes() {
    const { rawThreshold, fixedCount } = this.run;
    const notes = [];
    if (rawThreshold === null) notes.push("This run recorded no threshold that is a number.");
    if (fixedCount) {
      const what = fixedCount === 1 ? "1 image has a label" : `${count(fixedCount)} images have labels`;
      notes.push(`${what} that the score alone does not explain, e.g. by min_area; the slider leaves them.`);
    }
    return notes.map((textContent) => make("p", { className: "note", textContent }));
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

  free(label) {
    const { run } = this;
    return this.indices.filter((i) => run.label[i] === label && run.raw[i] !== null && run.fixed[i] === null);
  }

  // Halfway between a score and the next one, so that it does not matter which side the threshold itself is on.
  belowAnomalous() {
    const { run } = this;
    const lowest = this.free(1).reduce((least, i) => Math.min(least, run.raw[i]), Infinity);
    const next = run.scores.filter((score) => score < lowest).at(-1) ?? lowest - 0.02 * run.extent;
    return Number.isFinite(lowest) ? (lowest + next) / 2 : null;
  }

  aboveNormal() {
    const { run } = this;
    const highest = this.free(0).reduce((most, i) => Math.max(most, run.raw[i]), -Infinity);
    const next = run.scores.find((score) => score > highest) ?? highest + 0.02 * run.extent;
    return Number.isFinite(highest) ? (highest + next) / 2 : null;
  }

  raise(value) {
    this.run.raised = value;
    this.show();
    thresholdMoved(this.run);
  }

  // After a filter or the width has changed.
  count() {
    this.indices = counted(this.run);
    this.histogram.draw(this.indices);
    this.show();
  }

  // After the threshold has moved.
  show() {
    const { run } = this;
    const counts = run.counts(this.indices);
    const before = run.raised === run.initial ? null : run.counts(this.indices, run.initial);
    this.figures.replaceChildren(...figuresOf(counts, before));
    this.slider.value = this.positionOf(run.raised);
    this.slider.setAttribute("aria-valuetext", short(run.raised));
    this.input.value = exact(run.raised);
    const normalised = run.normalised(run.raised);
    this.scale.textContent = normalised === null ? "" : `normalised ${normalised.toFixed(3)}`;
    this.reset.disabled = run.raised === run.initial;
    this.command.replaceChildren(...commandOf(run));
    this.breakdown.replaceChildren(breakdownOf(run, this.indices));
    this.histogram.moveLine();
    this.histogram.element.setAttribute("aria-label", `Histogram of raw scores of ${run.name}: ${spoken(counts)}`);
  }
}

// The command that sets the threshold in a checkpoint, which lines break between its arguments only.
function commandOf(run) {
  const words = [
    "python -m anomalib_pack recalibrate",
    `--ckpt_path ${quoted(run.checkpoint ?? "MODEL.ckpt")}`,
    `--threshold ${exact(run.raised)}`,
    "--normal DIR",
    "--out NEW.ckpt",
  ];
  return words.flatMap((textContent, i) => [i ? " " : "", make("span", { textContent })]);
}

function quoted(text) {
  return /^[\w./:\\-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

function copyText(element, button) {
  window.getSelection().selectAllChildren(element); // for browsers that let no page copy
  const copied = navigator.clipboard ? navigator.clipboard.writeText(element.textContent) : Promise.reject();
  const say = (text) => {
    button.textContent = text;
    setTimeout(() => {
      button.textContent = "Copy";
    }, 1500);
  };
  copied.then(
    () => say("Copied"),
    () => say("Selected"),
  );
}

function figuresOf(counts, before) {
  const anomalous = counts.missed + counts.found;
  const normal = counts.alarm + counts.passed;
  const right = (of) => share(of.found + of.passed, anomalous + normal);
  const figures = [];
  const add = (kind, title, value, of, earlier) =>
    figures.push(
      make(
        "div",
        { className: `figure ${kind}` },
        make("dt", { textContent: title }),
        make("dd", { className: "value", textContent: value }),
        make("dd", { className: "of", textContent: before ? `${of}, was ${earlier(before)}` : of }),
      ),
    );
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
  return Object.keys(OUTCOMES)
    .filter((key) => counts[key])
    .map((key) => `${counts[key]} ${OUTCOMES[key].toLowerCase()}`)
    .join(", ");
}

// Misses and false alarms of each group.
function breakdownOf(run, indices) {
  const parts = new Map();
  for (const i of indices) {
    const names = [run.hasCategories ? run.category[i] : "", run.group[i]];
    const name = names.filter(Boolean).map(plain).join(" · ") || "all images";
    if (!parts.has(name)) parts.set(name, []);
    parts.get(name).push(i);
  }
  const rows = [...parts].sort(([a], [b]) => a.localeCompare(b, "en")).map(([name, of]) => breakdownRow(run, name, of));
  const head = ["Group", "Images", "Missed", "False alarms"].map((textContent, i) =>
    make("th", { scope: "col", className: i ? "number" : "", textContent }),
  );
  return make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
}

function breakdownRow(run, name, indices) {
  const counts = run.counts(indices);
  const mistakes = (value, kind, of) =>
    make("td", { className: value ? `number bad ${kind}` : "number", textContent: of ? count(value) : "" });
  return make(
    "tr",
    {},
    make("th", { scope: "row", textContent: name }),
    make("td", { className: "number", textContent: count(indices.length) }),
    mistakes(counts.missed, "missed", counts.missed + counts.found),
    mistakes(counts.alarm, "alarm", counts.alarm + counts.passed),
  );
}
