// What the user has chosen, and which images that leaves.

let runs = [];
let pictures = [];
const filters = { run: "", category: "", group: "" };
let outcome = "";
let sort = "worst";

const choices = { run: [], category: [], group: [] }; // that there are
const several = (name) => choices[name].length > 1;
const shownRuns = () => (filters.run === "" ? runs : [runs[Number(filters.run)]]);
const inCategory = (run, i) => filters.category === "" || run.category[i] === filters.category;

function indicesOf(run, isMember) {
  const indices = [];
  for (let i = 0; i < run.size; i += 1) {
    if ((filters.group === "" || isMember(i)) && inCategory(run, i)) indices.push(i);
  }
  return indices;
}

const listed = (run) => indicesOf(run, (i) => run.group[i] === filters.group);
// With a group, its images against all normal ones, as metrics of groups are computed.
const counted = (run) => indicesOf(run, (i) => run.group[i] === filters.group || run.label[i] === 0);
