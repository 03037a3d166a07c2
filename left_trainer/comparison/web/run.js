// The panel of one run: its figures, its curve, its samples.

function openRun(row) {
  const curve = h("div", { class: "chart" });
  const samples = h("div", { id: "samples" });
  const failures = failuresOf(row.task, row.method);
  const values = columnFields.filter((field) => field.value(row) !== null);
  redraw(byId("run"),
    h("header", {}, h("h2", { id: "run-title" }, methodLabel(row.method), ` on ${row.task}`),
      h("button", { class: "close", onclick: () => byId("run").close() }, "Close")),
    h("p", { class: "note" }, [familyTitle(row.family), ...row.seeds.map((seed) => `seed ${seed}`)].join(", ")),
    h("p", {}, row.notes),
    failures.map(({ seed, reason }) => h("p", { class: "worse" }, `Seed ${seed} failed: ${reason}`)),
    h("div", { class: "scroll" }, runMetrics(row)),
    h("dl", { class: "values" }, descriptions(values.map((field) => [field.title, fieldText(field, row), field.help]))),
    row.predictions.length ? drawPredictions(row) : [],
    row.curves.length ? [h("h3", {}, "Training loss"), curve] : [],
    row.samples ? [h("h3", {}, "Samples"), samples] : []);
  byId("run").showModal();
  byId("run").scrollTop = 0;
  // Only what is on the page has a width to draw to.
  if (row.curves.length) drawCurves(curve, row.curves.map((points, i) => seedCurve(row, points, i)), 260);
  if (row.samples) loadSamples(row, samples);
}

/** Load the file with a row's samples. It is a script that calls `showSamples`: a page opened as a file loads no data. */
function loadSamples(row, container) {
  window.showSamples = (samples) => redraw(container, samples.map((sample) => drawSample(row, sample)));
  const script = h("script", { src: `samples/${row.samples}`,
    onload: () => script.remove(),
    onerror: () => redraw(container, h("p", { class: "note" },
      `The file samples/${row.samples} is not beside this page. Copy the folder samples with it.`)),
  });
  container.append("Loading\u2026", script);
}

/** Links to the files beside the page with what the model wrote for each row of the test split. */
function drawPredictions({ predictions, seeds, task }) {
  const rows = summary.tasks.find(({ name }) => name === task).settings["test rows"];
  const links = predictions.map((path, i) =>
    h("a", { href: path.split("/").map(encodeURIComponent).join("/"), download: "" }, `seed ${seeds[i]}`));
  return h("p", { class: "downloads" }, `Predictions of all ${rows ?? ""} test rows (JSONL): `,
    links.flatMap((link, i) => (i ? [", ", link] : [link])));
}

function seedCurve(row, points, i) {
  return {
    name: `seed ${row.seeds[i]}`,
    family: familyIndex(row.family),
    dash: DASHES[i % DASHES.length],
    points: points.filter(([, loss]) => isNumber(loss)),
  };
}

function runMetrics(row) {
  const { metrics } = summary.tasks.find(({ name }) => name === row.task);
  const scored = isBase(row) ? ["Score"] : ["Before", "After"];
  const titles = ["Metric", ...scored, "95 % interval"];
  const cells = ({ before, mean, low, high, interval: over }) => {
    const interval = isNumber(low) && isNumber(high) ? `${oneDecimal(low)} to ${oneDecimal(high)}, over ${over}` : null;
    const scores = isBase(row) ? [mean] : [before, mean];
    return [...scores.map((score) => show(score, "score")), show(interval)];
  };
  const rows = metrics.filter((name) => row.metrics[name]).map((name) => h("tr", {}, h("th", { scope: "row" }, name),
    cells(row.metrics[name]).map((text) => h("td", {}, text))));
  return h("table", {},
    h("thead", {}, h("tr", {}, titles.map((title) => h("th", { scope: "col" }, title)))),
    h("tbody", {}, rows));
}

function drawSample(row, { source, reference, before, after }) {
  const block = (title, text, content) =>
    h("div", {}, h("h4", {}, title), h("p", { dir: "auto" }, text ? content : "(empty)"));
  const prediction = (title, text) => block(title, text, markShared(text ?? "", reference ?? ""));
  return h("article", { class: "sample" },
    block("Source", source, source), block("Reference", reference, reference),
    prediction(isBase(row) ? "Prediction" : "Prediction before", before),
    isBase(row) ? null : prediction("Prediction after", after));
}

/** The words of a prediction, those marked that its reference has too. */
function markShared(text, reference) {
  const shared = new Set(reference.split(/\s+/).filter(Boolean));
  return text.split(/(\s+)/).map((word) => (shared.has(word) ? h("mark", {}, word) : word));
}
