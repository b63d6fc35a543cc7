// One image, large, with all that is known of it.

let viewed = 0;

function view(position) {
  viewed = between(0, position, ordered.length - 1);
  const each = ordered[viewed];
  const { run, i, what } = each;
  const step = (text, label, by) => {
    const button = buttonOf(text, () => view(viewed + by));
    button.setAttribute("aria-label", label);
    button.disabled = !ordered[viewed + by];
    return button;
  };
  const viewer = byId("viewer");
  const close = buttonOf("Close", () => viewer.close());
  const title = make("h2", { id: "viewer-title", textContent: fileName(run.path[i]) });
  const steps = [step("←", "Image before", -1), step("→", "Next image", 1)];
  const bar = make("div", { className: "viewer-bar" }, title, ...steps, close);
  const properties = make("dl", { className: "properties" });
  for (const [name, value] of propertiesOf(run, i, what)) {
    if (value !== "" && value !== null) properties.append(make("dt", { textContent: name }), make("dd", {}, value));
  }
  const focused = viewer.contains(document.activeElement) ? document.activeElement.textContent : "";
  viewer.replaceChildren(bar, frameOf(pictureOf(each)), properties);
  if (!viewer.open) viewer.showModal();
  const again = [...bar.querySelectorAll("button:enabled")].find((button) => button.textContent === focused);
  (again ?? close).focus();
}

function frameOf(picture) {
  if (!picture) return "";
  picture.loading = "eager";
  picture.classList.toggle("small", picture.height < 256);
  picture.classList.toggle("wide", picture.width > 2 * picture.height);
  return make("div", { className: "frame", tabIndex: 0 }, picture);
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
