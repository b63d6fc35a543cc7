// The images that the filters leave, in parts, because thousands at once would stall a browser.

const FIRST = 12; // images
const PAGE = 48; // those that are added at a time
const SORTS = {
  worst: "Worst mistakes first",
  nearest: "Nearest to the threshold",
  highest: "Highest score",
  lowest: "Lowest score",
  file: "File name",
};

let ordered = []; // what the filters leave: the run, the index of the image in it, and its outcome
let shown = 0;

function order() {
  const all = [];
  const numbers = noOutcomes();
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
    all.sort(
      (a, b) => a.run.path[a.i].localeCompare(b.run.path[b.i], "en", { numeric: true }) || a.run.index - b.run.index,
    );
  } else {
    for (const each of all) each.key = keys[sort](each);
    all.sort((a, b) => a.key - b.key || a.run.index - b.run.index || a.i - b.i);
  }
  ordered = all;
  showOutcomes(numbers);
}

// Mistakes that are far from the threshold, then whatever is near to it.
function rank(what, distance) {
  if (what === "unscored") return Infinity;
  return what === "missed" || what === "alarm" ? -1 - distance : distance;
}

// What nothing has become has no button, but for mistakes, of which it is good to read that there are none.
function showOutcomes(numbers) {
  const total = Object.values(numbers).reduce((sum, number) => sum + number, 0);
  const labelled = numbers.missed + numbers.alarm + numbers.found + numbers.passed;
  for (const button of byId("gallery-bar").querySelectorAll(".outcomes button")) {
    const key = button.dataset.outcome;
    const number = key === "" ? total : numbers[key];
    const isMistake = key === "missed" || key === "alarm";
    button.textContent = `${key === "" ? "All" : OUTCOMES_OF_MANY[key]} ${count(number)}`;
    button.hidden = !(number || key === "" || key === outcome || (isMistake && labelled));
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
  const next = ordered.slice(shown, shown + (shown ? PAGE : FIRST));
  byId("gallery").append(...next.map((each, position) => itemOf(each, shown + position)));
  shown += next.length;
  const rest = ordered.length - shown;
  byId("more").hidden = !rest;
  byId("more").textContent = `Show ${count(Math.min(PAGE, rest))} more of ${count(ordered.length)}`;
  byId("status").textContent = ordered.length
    ? `${count(shown)} of ${count(ordered.length)} images, ${SORTS[sort].toLowerCase()}`
    : "No image passes the filters.";
}

function pictureOf({ run, i }) {
  const index = run.picture[i];
  if (index === null) return null;
  const [width, height, content] = pictures[index];
  return make("img", {
    loading: "lazy",
    decoding: "async",
    width,
    height,
    alt: `Picture of ${fileName(run.path[i])}`,
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
  const about = [several("category") ? run.category[i] : "", run.explanation[i], several("run") ? run.name : ""]
    .filter(Boolean)
    .map(plain);
  const text = make(
    "span",
    { className: "text" },
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
