// The second half of eval/browse_page.py's script: state in the address's hash -> rows chosen and sorted -> shown.

// ------------------------------------------------------------------------------------------------------------- state

const CHUNK = 40; // cards drawn at once; more follow as one scrolls, all of them before printing
const DEFAULTS = {
  task: Object.keys(DATA.tasks)[0],
  shots: "",
  sort: MAIN,
  min: "",
  max: "",
  q: "",
  zero: "",
  differ: "",
  item: "",
};
let state = {};

function read() {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const next = { ...DEFAULTS };
  for (const key of Object.keys(DEFAULTS)) if (key in given) next[key] = given[key];
  if (!Object.hasOwn(DATA.tasks, next.task)) next.task = DEFAULTS.task;
  const known = Object.keys(DATA.tasks[next.task].shots);
  if (!known.includes(next.shots)) next.shots = known.at(-1);
  if (!fields(next).some(([key]) => key === next.sort)) next.sort = MAIN;
  for (const key of ["min", "max"]) if (next[key] !== "" && !Number.isFinite(Number(next[key]))) next[key] = "";
  state = next;
}

function go(change, replace) {
  const next = { ...state, item: "", ...change };
  const last = Object.keys(DATA.tasks[next.task].shots).at(-1);
  const parts = Object.keys(DEFAULTS).filter((key) => next[key] !== (key === "shots" ? last : DEFAULTS[key]));
  const hash = "#" + new URLSearchParams(parts.map((key) => [key, next[key]]));
  if (replace) history.replaceState(null, "", hash);
  else history.pushState(null, "", hash);
  show();
}

// -------------------------------------------------------------------------------------------------------------- rows

function rows(of) {
  const task = DATA.tasks[of.task];
  const cell = task.shots[of.shots];
  return task.items.map((item, at) => {
    const answers = cell.sides.map((side) => side.answers[at]);
    return { item, at, answers, difference: PAIR ? answers[1].score - answers[0].score : null };
  });
}

// [key, name, value of a row]; "-key" is the other way round
function fields(of) {
  const cell = DATA.tasks[of.task].shots[of.shots];
  const found = [];
  const both = (key, value, up, down) => found.push([key, up, value], ["-" + key, down, value]);
  if (PAIR) {
    both("difference", (row) => row.difference, "B falls behind most", "B gains most");
    found.push(["-apart", "furthest apart", (row) => Math.abs(row.difference)]);
  }
  cell.sides.forEach((side, number) => {
    const who = PAIR ? LETTER[number] + ": " : "";
    const mark = number ? "b." : "";
    both(mark + "score", (row) => row.answers[number].score, who + "worst score", who + "best score");
    if (side.answers.some((answer) => typeof answer.logprob === "number"))
      both(mark + "logprob", (row) => row.answers[number].logprob, who + "least sure (logprob)", who + "most sure (logprob)");
    const more = new Set(side.answers.flatMap((answer) => Object.keys(answer.more)));
    for (const key of more)
      if (side.answers.some((answer) => typeof answer.more[key] === "number"))
        both(mark + key, (row) => row.answers[number].more[key], `${who}lowest ${words(key)}`, `${who}highest ${words(key)}`);
  });
  found.push(["plan", "order of the plan", () => 0]);
  return found;
}

function chosen() {
  const task = DATA.tasks[state.task];
  const edges = task.shots[state.shots].histogram.edges;
  const value = (row) => (PAIR ? row.difference : row.answers[0].score);
  const low = state.min === "" ? -Infinity : Number(state.min);
  const high = state.max === "" ? Infinity : Number(state.max);
  const asked = state.q.toLowerCase();
  const kept = rows(state).filter((row) => {
    if (value(row) < low || (value(row) >= high && !(high === edges.at(-1) && value(row) === high))) return false;
    if (state.zero && !row.answers.some((answer) => answer.score === 0)) return false;
    if (state.differ && row.answers[0].prediction === row.answers.at(-1).prediction) return false;
    const texts = [
      row.item.id,
      row.item.question || "",
      ...row.answers.map((a) => a.prediction),
      ...row.item.references.map((r) => r[0]),
    ];
    return !asked || texts.some((text) => text.toLowerCase().includes(asked));
  });
  const [key, , by] = fields(state).find(([name]) => name === state.sort);
  const sign = key.startsWith("-") ? -1 : 1;
  const number = (row) => (typeof by(row) === "number" ? sign * by(row) : Infinity); // what has no value comes last
  return kept.sort((a, b) => (number(a) === number(b) ? a.at - b.at : number(a) - number(b)));
}

// ---------------------------------------------------------------------------------------------------------- controls

let controls = {};

function toolbar() {
  const segment = (name, label) => {
    const node = h("div", { class: "segment", role: "group", "aria-label": label });
    controls[name] = node;
    return node;
  };
  const typed = (key) => (event) => go({ [key]: event.target.value.trim() }, true);
  const field = (key, attributes) => (controls[key] = h("input", { id: key, oninput: typed(key), ...attributes }));
  const toggle = (key, label) => {
    controls[key] = h("input", {
      type: "checkbox",
      id: key,
      onchange: (event) => go({ [key]: event.target.checked ? "1" : "" }),
    });
    return h("label", { class: "toggle" }, controls[key], label);
  };
  controls.sort = h("select", { id: "sort", "aria-label": "order", onchange: (event) => go({ sort: event.target.value }) });
  controls.status = h("p", { class: "status", role: "status" });
  const what = PAIR ? "difference" : "score";
  return h(
    "nav",
    { "aria-label": "controls" },
    h(
      "div",
      { class: "row" },
      segment("task", "task"),
      segment("shots", "shots"),
      field("q", { type: "search", placeholder: "search question, answer, reference  ( / )", "aria-label": "search" }),
    ),
    h(
      "div",
      { class: "row" },
      controls.sort,
      toggle("zero", PAIR ? "a zero score" : "only zero scores"),
      PAIR ? toggle("differ", "different answers") : null,
      h(
        "span",
        { class: "range" },
        `${what} from `,
        field("min", { inputmode: "decimal", size: 5, "aria-label": `${what} from` }),
        " to below ",
        field("max", { inputmode: "decimal", size: 5, "aria-label": `${what} to below` }),
      ),
      controls.status,
      (controls.reset = h(
        "button",
        { type: "button", class: "quiet", onclick: () => go({ ...DEFAULTS, task: state.task, shots: state.shots }) },
        "clear",
      )),
      h("button", { type: "button", class: "quiet", onclick: help, "aria-label": "keys" }, "?"),
    ),
  );
}

function fill(node, entries, current, choose) {
  node.replaceChildren(
    ...entries.map(([value, label]) =>
      h(
        "button",
        { type: "button", "aria-pressed": String(value === current), "data-value": value, onclick: () => choose(value) },
        label,
      ),
    ),
  );
}

const KEYS = [
  ["j, k", "next, previous item"],
  ["o", "prompt of the item"],
  ["/", "search"],
  ["[, ]", "fewer, more shots"],
  ["{, }", "previous, next task"],
  ["z", PAIR ? "items with a zero score" : "only zero scores"],
  ["c", "clear filters and order"],
  ["?", "these keys"],
];

function help() {
  const box = h(
    "dialog",
    { onclick: () => box.close(), onclose: () => box.remove() },
    h("h2", {}, "Keys"),
    h(
      "table",
      {},
      KEYS.map(([key, what]) => h("tr", {}, h("th", {}, h("kbd", {}, key)), h("td", {}, what))),
    ),
    h("p", { class: "note" }, "The address holds task, order and filters: copy it to come back to them."),
  );
  document.body.append(box);
  box.showModal();
}

// -------------------------------------------------------------------------------------------------------------- page

let list = [];
let drawn = 0;
const items = h("ol", { class: "items" });
const end = h("p", { class: "end" });
const body = h("div", { class: "summary-place" });

function more(count) {
  for (const stop = Math.min(list.length, drawn + count); drawn < stop; drawn++) items.append(itemCard(list[drawn], drawn + 1));
  end.textContent =
    drawn < list.length ? `${list.length - drawn} more below` : list.length ? "" : "No item fits. Clear a filter (c).";
}

function show() {
  read();
  const task = DATA.tasks[state.task];
  list = chosen();
  drawn = 0;
  fill(
    controls.task,
    Object.keys(DATA.tasks).map((name) => [name, name]),
    state.task,
    (name) =>
      go({
        task: name,
        min: "",
        max: "",
        sort: MAIN,
        shots: Object.hasOwn(DATA.tasks[name].shots, state.shots) ? state.shots : Object.keys(DATA.tasks[name].shots).at(-1),
      }),
  );
  fill(
    controls.shots,
    Object.keys(task.shots).map((k) => [k, k + "-shot"]),
    state.shots,
    (k) => go({ shots: k, min: "", max: "" }),
  );
  controls.sort.replaceChildren(
    ...fields(state).map(([key, name]) =>
      h("option", { value: key, selected: key === state.sort }, key === "plan" ? name : name + " first"),
    ),
  );
  for (const key of ["q", "min", "max"]) if (document.activeElement !== controls[key]) controls[key].value = state[key];
  for (const key of ["zero", "differ"]) if (controls[key]) controls[key].checked = state[key] !== "";
  controls.status.textContent = `${list.length} of ${task.items.length} items`;
  controls.reset.hidden = ["min", "max", "q", "zero", "differ"].every((key) => !state[key]) && state.sort === MAIN;
  body.replaceChildren(summary());
  items.replaceChildren();
  const at = list.findIndex((row) => row.item.id === state.item);
  more(Math.max(CHUNK, at + 1));
  if (at >= 0) focusItem(at);
}

function focusItem(at) {
  if (at < 0 || at >= list.length) return;
  if (at >= drawn) more(Math.max(CHUNK, at + 1 - drawn));
  items.children[at].focus({ preventScroll: true });
  items.children[at].scrollIntoView({ block: "start" });
}

function step(names, current, by) {
  return names[Math.min(names.length - 1, Math.max(0, names.indexOf(current) + by))];
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog")) return;
  if (["INPUT", "SELECT"].includes(event.target.tagName) && event.target.type !== "checkbox") {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const current = [...items.children].indexOf(document.activeElement.closest?.(".item"));
  const shots = (by) =>
    controls.shots.querySelector(`[data-value="${step(Object.keys(DATA.tasks[state.task].shots), state.shots, by)}"]`).click();
  const tasks = (by) => {
    const name = step(Object.keys(DATA.tasks), state.task, by);
    [...controls.task.children].find((b) => b.dataset.value === name).click();
  };
  const acts = {
    j: () => focusItem(current + 1),
    k: () => focusItem(Math.max(0, current - 1)),
    "/": () => controls.q.focus(),
    "?": help,
    o: () => items.children[current]?.querySelectorAll("details.prompt").forEach((box) => (box.open = !box.open)),
    "[": () => shots(-1),
    "]": () => shots(1),
    "{": () => tasks(-1),
    "}": () => tasks(1),
    z: () => controls.zero.click(),
    c: () => controls.reset.click(),
  };
  if (!Object.hasOwn(acts, event.key)) return;
  event.preventDefault();
  acts[event.key]();
});

document.body.append(h("main", {}, head(), toolbar(), body, items, end));
new IntersectionObserver(
  (seen) => {
    if (seen.some((entry) => entry.isIntersecting) && drawn < list.length) more(CHUNK);
  },
  { rootMargin: "1200px" },
).observe(end);
addEventListener("hashchange", show);
addEventListener("beforeprint", () => more(list.length));
show();
