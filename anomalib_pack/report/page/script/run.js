// A run: its images, a list for each of their properties, and the threshold that the user has raised or lowered.

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

const noOutcomes = () => Object.fromEntries(Object.keys(OUTCOMES).map((key) => [key, 0]));

class Run {
  constructor(data, index) {
    Object.assign(this, data, { index });
    this.size = this.path.length;
    this.hasCategories = new Set(this.category).size > 1;
    this.scores = this.scoresOf(() => true);
    const lowest = this.scores[0] ?? 0;
    const highest = this.scores.at(-1) ?? 1;
    this.extent = highest - lowest || 1;
    // Some models call a score that equals the threshold anomalous.
    this.inclusive = this.raw.some(
      (score, i) => score === this.rawThreshold && score !== null && this.predicted[i] === 1,
    );
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

  // Pairs of raw and normalised scores, between which normalised thresholds are interpolated.
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

  // From the threshold, as a share of the range of scores, so that runs of different models can be compared.
  distance(i) {
    return Math.abs(this.raw[i] - this.raised) / this.extent;
  }

  // Numbers of outcomes at the threshold, or at another one.
  counts(indices, threshold = this.raised) {
    const before = this.raised;
    this.raised = threshold;
    const counts = noOutcomes();
    for (const i of indices) counts[this.outcome(i)] += 1;
    this.raised = before;
    return counts;
  }
}
