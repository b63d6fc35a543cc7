// ROC, and precision against recall, of the runs that are shown.

const CURVES = 8; // colours; further curves are dashed

// Corners of both curves: at each distinct score, what is above it.
function cornersOf(run, indices) {
  const scored = indices
    .filter((i) => run.raw[i] !== null && run.label[i] !== null)
    .sort((a, b) => run.raw[b] - run.raw[a]);
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

// Each kind: title and axes, what it needs, its points, the area under it, and where it is at the threshold.
const KINDS = [
  {
    title: "ROC",
    across: "false alarms among normal images",
    up: "found among anomalous images",
    area: "AUROC",
    exists: ({ anomalous, normal }) => anomalous && normal,
    points: ({ corners, anomalous, normal }) => corners.map(([alarms, found]) => [alarms / normal, found / anomalous]),
    areaOf: (points) =>
      points.slice(1).reduce((sum, [x, y], i) => sum + ((x - points[i][0]) * (y + points[i][1])) / 2, 0),
    at: (counts) => [counts.alarm / (counts.alarm + counts.passed), counts.found / (counts.found + counts.missed)],
  },
  {
    title: "Precision and recall",
    across: "recall: found among anomalous images",
    up: "precision: anomalous among called so",
    area: "AP",
    exists: ({ anomalous }) => anomalous,
    points: ({ corners, anomalous }) =>
      corners.slice(1).map(([alarms, found]) => [found / anomalous, found / (found + alarms)]),
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
    const plot = axesOf(kind);
    const legend = make("ul", { className: "legend" });
    for (const run of shownRuns()) drawCurve(kind, run, plot, legend);
    if (!legend.children.length) {
      legend.append(
        make("li", { textContent: "Needs images with labels of both kinds, which the filters leave none of." }),
      );
    }
    return make("div", { className: "card" }, make("h3", { textContent: kind.title }), legend, plot);
  });
  byId("plots").replaceChildren(...drawn);
  for (const run of shownRuns()) movePoints(run);
}

function axesOf(kind) {
  const plot = draw("svg", {
    class: "plot",
    role: "img",
    "aria-label": kind.title,
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
  return plot;
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
  const line = draw("path", { class: look, d: "M0 6H22" });
  const sample = draw("svg", { width: 22, height: 12, class: "plot", "aria-hidden": "true" }, line);
  const name = several("run") ? `${run.name}: ` : "";
  legend.append(make("li", {}, sample, `${name}${kind.area} ${kind.areaOf(corners).toFixed(3)}`));
}

// A path without the corners that nobody could see.
function pathOf(corners) {
  let [lastX, lastY] = [-9, -9];
  return corners
    .map(([x, y], i) => {
      const [px, py] = [plotX(x), plotY(y)];
      if (i < corners.length - 1 && Math.abs(px - lastX) + Math.abs(py - lastY) < 0.4) return "";
      [lastX, lastY] = [px, py];
      return `${i ? "L" : "M"}${px.toFixed(1)} ${py.toFixed(1)}`;
    })
    .join("");
}

function movePoints(run) {
  for (const [kind, circle] of points.get(run) ?? []) {
    const [x, y] = kind.at(run.counts(panels[run.index].indices));
    circle.setAttribute("cx", plotX(x));
    circle.setAttribute("cy", plotY(y));
  }
}
