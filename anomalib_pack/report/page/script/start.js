// What happens when.

let panels = [];
let waiting = 0;

function thresholdMoved(run) {
  movePoints(run);
  clearTimeout(waiting);
  waiting = setTimeout(showGallery, 120); // pictures follow when the slider rests
  const numbers = noOutcomes();
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
    byId("filters").append(
      selectOf(label, [all, ...options], "", (value) => {
        filters[name] = value;
        filtersChanged();
      }),
    );
  }
}

function makeGalleryBar() {
  const buttons = ["", ...Object.keys(OUTCOMES)].map((key) => {
    const button = buttonOf("", () => {
      outcome = key;
      showGallery();
    });
    button.dataset.outcome = key;
    return button;
  });
  const outcomes = make("div", { className: "outcomes", role: "group", "aria-label": "Outcome" }, ...buttons);
  byId("gallery-bar").append(
    outcomes,
    selectOf("Sort", Object.entries(SORTS), sort, (value) => {
      sort = value;
      showGallery();
    }),
  );
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
    if (by && ordered[viewed + by]) view(viewed + by);
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
  findChoices();
  panels = runs.map((run) => new Panel(run));
  fitColumns();
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
