// The script of eval/browse_page.py: state in the address's hash -> rows chosen and sorted -> cards. Text is only ever set as text.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const PAIR = DATA.sides.length === 2;
const MAIN = PAIR ? "difference" : "score"; // what the histogram, the range and the default order are about
const CHUNK = 40; // cards drawn at once; more follow as one scrolls, all of them before printing
const LETTER = ["A", "B"];

function h(tag, attributes, ...children) {
  const svg = ["svg", "rect", "line", "text", "g", "title"].includes(tag) && attributes?.ns !== false;
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false || key === "ns") continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat(3).filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

// control characters as their pictures, as data_pipelines/page.py shows them
const visible = (text) => String(text).replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)));
const said = (tag, name, text) => h(tag, { class: name, dir: "auto" }, visible(text));
const fixed = (value, digits) => (value < 0 ? "\u2212" : "") + Math.abs(value).toFixed(digits);
const signed = (value, digits) => (value > 0 ? "+" : "") + fixed(value, digits);
const plain = (value) => (typeof value === "number" ? fixed(value, Number.isInteger(value) ? 0 : 3) : String(value));
const words = (key) => key.replaceAll("_", " ");
const metric = (name) => (name === "cider_d" ? "CIDEr-D" : name);
const error = (se) => (se === null ? "error n/a" : "\u00b1 " + se.toFixed(1));

// ------------------------------------------------------------------------------------------------------------- state

const DEFAULTS = { task: Object.keys(DATA.tasks)[0], shots: "", sort: MAIN, min: "", max: "", q: "", zero: "", differ: "", item: "" };
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
    const texts = [row.item.id, row.item.question || "", ...row.answers.map((a) => a.prediction), ...row.item.references.map((r) => r[0])];
    return !asked || texts.some((text) => text.toLowerCase().includes(asked));
  });
  const [key, , by] = fields(state).find(([name]) => name === state.sort);
  const sign = key.startsWith("-") ? -1 : 1;
  const number = (row) => (typeof by(row) === "number" ? sign * by(row) : Infinity); // what has no value comes last
  return kept.sort((a, b) => (number(a) === number(b) ? a.at - b.at : number(a) - number(b)));
}

// -------------------------------------------------------------------------------------------------------------- head

function head() {
  const sides = DATA.sides.map((side, number) => {
    const control = side.control ? h("span", { class: "control" }, `control: images ${side.control}`) : null;
    const letter = PAIR ? h("b", { class: "letter side" + number }, LETTER[number]) : null;
    return h("span", { class: "run" }, letter, side.label, control);
  });
  const banners = DATA.sides.filter((side) => side.missing.length).map((side) =>
    h("p", { class: "banner" }, `${side.label} is not finished. Not on this page: ${side.missing.join(", ")}.`));
  const plans = new Set(DATA.sides.map((side) => side.facts.plan));
  if (plans.size > 1)
    banners.push(h("p", { class: "banner" }, "The two have different plans: compared are the items that both were asked, after the demonstrations that each had."));
  const keys = Object.keys(DATA.sides[0].facts);
  const table = h("table", { class: "facts" },
    PAIR ? h("tr", {}, h("th", {}), DATA.sides.map((side, number) => h("th", {}, `${LETTER[number]}: ${side.label}`))) : null,
    keys.map((key) => h("tr", {}, h("th", {}, key), DATA.sides.map((side) => said("td", "", side.facts[key])))));
  const line = ["plan", "seed", "demonstrations", "sample", "images", "corpus"].map((key) => {
    const values = [...new Set(DATA.sides.map((side) => side.facts[key]))].map((value) => (key === "plan" ? value.slice(0, 12) : visible(value)));
    return `${key} ${values.join(" / ")}`;
  });
  return h("header", {}, h("h1", {}, sides), h("p", { class: "line" }, line.join(" \u00b7 ")), banners, h("details", { class: "about" }, h("summary", {}, "About this evaluation"), table));
}

function summary() {
  const task = DATA.tasks[state.task];
  const cell = task.shots[state.shots];
  const cards = cell.sides.map((side, number) => card(side.mean.toFixed(1), error(side.se), PAIR ? LETTER[number] + ", mean" : "mean score", "side" + number));
  if (PAIR) cards.push(card(signed(cell.difference.mean, 1), error(cell.difference.se), "B \u2212 A, paired"));
  const n = cell.sides[0];
  cards.push(card(n.n.toLocaleString("en"), "", n.clusters < n.n ? `items, ${n.clusters.toLocaleString("en")} images` : "items"));
  if (task.chance !== null) cards.push(card(task.chance.toFixed(1), "", "chance"));
  const prompts = [...new Set(task.prompts)].join(" and ");
  const held = task.items.length.toLocaleString("en");
  const part = task.items.length < task.of ? ` This page holds ${held} of the items; means and bars are of all of them.` : "";
  return h("section", { class: "summary" },
    h("div", {}, h("div", { class: "cards" }, cards),
      h("p", { class: "note" }, `${state.task}, ${state.shots}-shot: ${metric(task.metric)}, in points; ${prompts} prompts. Means \u00b1 standard errors clustered by image.${part}`)),
    h("figure", {}, bars(cell.histogram), h("figcaption", {}, (PAIR ? "differences B \u2212 A of all items, none in grey" : "scores of all items, zeros in red") + "; click a bar to see its items")));
}

const card = (value, extra, name, side) => h("div", { class: side }, h("b", {}, value, extra ? h("small", {}, extra) : null), h("span", {}, name));

function bars(histogram) {
  const [width, height, foot] = [420, 84, 16];
  const { counts, edges } = histogram;
  const most = Math.max(...counts, 1);
  const step = width / counts.length;
  const root = h("svg", { viewBox: `0 0 ${width} ${height + foot}`, class: "bars", role: "group", "aria-label": "histogram" });
  counts.forEach((count, i) => {
    const [from, to] = [String(edges[i]), String(edges[i + 1])];
    const on = state.min === from && state.max === to;
    const tall = count ? Math.max(2, ((height - 4) * count) / most) : 0;
    const choose = () => go(on ? { min: "", max: "" } : { min: from, max: to });
    const kind = PAIR ? (edges[i] < 0 ? "worse" : "better") : "";
    const zeros = edges[i] === 0 && count ? (tall * histogram.zeros) / count : 0; // exactly zero: no point, or no difference
    const bar = (name, top, size) => h("rect", { class: name, x: i * step + 0.75, y: height - top, width: Math.max(1, step - 1.5), height: size, rx: 1.5 });
    root.append(h("g", { class: `bin ${kind}${on ? " on" : ""}`, tabindex: count ? 0 : null, role: "button", "data-from": from,
      onclick: choose, onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); choose(); } } },
      h("title", {}, `${count} items from ${from} to ${to}${zeros ? `, ${histogram.zeros} of them exactly 0` : ""}`),
      h("rect", { class: "hit", x: i * step, y: 0, width: step, height }),
      bar("bar", tall, tall - zeros), bar(PAIR ? "bar same" : "bar nil", zeros, zeros)));
  });
  root.append(h("line", { x1: 0, x2: width, y1: height + 0.5, y2: height + 0.5 }));
  const zero = edges.indexOf(0);
  const marks = zero > 0 ? [0, zero, edges.length - 1] : [0, Math.floor((edges.length - 1) / 2), edges.length - 1];
  for (const i of marks)
    root.append(h("text", { x: i * step, y: height + 12, "text-anchor": i === 0 ? "start" : i === edges.length - 1 ? "end" : "middle" }, plain(edges[i])));
  return root;
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
    controls[key] = h("input", { type: "checkbox", id: key, onchange: (event) => go({ [key]: event.target.checked ? "1" : "" }) });
    return h("label", { class: "toggle" }, controls[key], label);
  };
  controls.sort = h("select", { id: "sort", "aria-label": "order", onchange: (event) => go({ sort: event.target.value }) });
  controls.status = h("p", { class: "status", role: "status" });
  const what = PAIR ? "difference" : "score";
  return h("nav", { "aria-label": "controls" },
    h("div", { class: "row" }, segment("task", "task"), segment("shots", "shots"),
      field("q", { type: "search", placeholder: "search question, answer, reference  ( / )", "aria-label": "search" })),
    h("div", { class: "row" }, controls.sort, toggle("zero", PAIR ? "a zero score" : "only zero scores"), PAIR ? toggle("differ", "different answers") : null,
      h("span", { class: "range" }, `${what} from `, field("min", { inputmode: "decimal", size: 5, "aria-label": `${what} from` }),
        " to below ", field("max", { inputmode: "decimal", size: 5, "aria-label": `${what} to below` })),
      controls.status,
      (controls.reset = h("button", { type: "button", class: "quiet", onclick: () => go({ ...DEFAULTS, task: state.task, shots: state.shots }) }, "clear")),
      h("button", { type: "button", class: "quiet", onclick: help, "aria-label": "keys" }, "?")));
}

function fill(node, entries, current, choose) {
  node.replaceChildren(...entries.map(([value, label]) =>
    h("button", { type: "button", "aria-pressed": String(value === current), "data-value": value, onclick: () => choose(value) }, label)));
}

const KEYS = [["j, k", "next, previous item"], ["o", "prompt of the item"], ["/", "search"], ["[, ]", "fewer, more shots"], ["{, }", "previous, next task"],
  ["z", PAIR ? "items with a zero score" : "only zero scores"], ["c", "clear filters and order"], ["?", "these keys"]];

function help() {
  const box = h("dialog", { onclick: () => box.close(), onclose: () => box.remove() }, h("h2", {}, "Keys"),
    h("table", {}, KEYS.map(([key, what]) => h("tr", {}, h("th", {}, h("kbd", {}, key)), h("td", {}, what)))),
    h("p", { class: "note" }, "The address holds task, order and filters: copy it to come back to them."));
  document.body.append(box);
  box.showModal();
}

// ------------------------------------------------------------------------------------------------------------- cards

const picture = (number, name, unseen) =>
  h("img", { src: DATA.images[number], alt: "", class: name + (unseen ? " unseen" : ""), decoding: "async", title: unseen ? "not shown to the model" : null });

function itemCard(row, rank) {
  const { item, answers } = row;
  const [first, second] = answers;
  const swapped = answers.map((answer) => answer.image !== null && answer.image !== item.image);
  const blind = answers.every((answer) => answer.image === null);
  const image = h("div", { class: "query" }, picture(item.image, "own", blind || swapped.every(Boolean)),
    blind ? h("small", {}, "no image was shown") : null,
    answers.map((answer, number) => (swapped[number]
      ? h("figure", { class: "swap" }, picture(answer.image, ""), h("figcaption", {}, (PAIR ? LETTER[number] + " was " : "") + "shown this instead")) : null)),
    PAIR && !blind ? answers.map((answer, number) => (answer.image === null ? h("small", {}, `${LETTER[number]} was shown no image`) : null)) : null);
  const own = (number, key) => answers[number][key] ?? first[key];
  const shared = !second || !("demonstrations" in second);
  return h("li", { class: "item", tabindex: -1, "data-id": item.id, "data-rank": rank },
    h("div", { class: "title" }, h("span", {}, `${rank}`),
      h("a", { href: "#" + new URLSearchParams({ task: state.task, shots: state.shots, item: item.id }), title: "a link to this item" }, visible(item.id)),
      PAIR ? h("b", { class: "change " + (row.difference < 0 ? "worse" : row.difference > 0 ? "better" : "") }, signed(row.difference, 1)) : null),
    image,
    h("div", { class: "text" },
      item.question ? said("p", "question", item.question) : null,
      h("div", { class: "answers" }, answers.map((answer, number) => answerBlock(answer, number))),
      h("div", { class: "references" }, h("span", { class: "label" }, DATA.tasks[state.task].kind === "vqa" ? "answers" : "references"),
        item.references.map(([text, count]) => h("span", { class: "reference", dir: "auto" }, visible(text), count > 1 ? h("i", {}, "\u00d7" + count) : null))),
      answers.map((_, number) => {
        if (number && shared) return null;
        const list = own(number, "demonstrations");
        return list.length ? demonstrations(list, answers[number].image === null, PAIR && !shared ? LETTER[number] + ": " : "") : null;
      }),
      answers.map((_, number) => {
        if (number && !("prompt" in second) && shared && second.image === first.image) return null;
        const only = second && !("prompt" in second) && shared && second.image === first.image;
        return prompt(own(number, "prompt"), own(number, "demonstrations"), answers[number].image, PAIR && !only ? LETTER[number] + ": " : "");
      })));
}

function answerBlock(answer, number) {
  const cell = DATA.tasks[state.task].shots[state.shots];
  const top = (cell.top ??= Math.max(100, ...cell.sides.flatMap((side) => side.answers.map((a) => a.score)))); // CIDEr-D goes to 1000
  const meter = h("svg", { class: "meter", viewBox: "0 0 100 4", preserveAspectRatio: "none", "aria-hidden": "true" },
    h("rect", { class: "track", width: 100, height: 4, rx: 2 }), h("rect", { width: Math.min(100, (100 * answer.score) / top), height: 4, rx: 2 }));
  const facts = typeof answer.logprob === "number" ? [["logprob", plain(answer.logprob)]] : [];
  for (const [key, value] of Object.entries(answer.more))
    if (value !== null && typeof value === "object" && !Array.isArray(value)) for (const [name, held] of Object.entries(value)) facts.push([name, plain(held)]);
    else if (value !== null) facts.push([words(key), plain(value)]);
  const level = answer.score === 0 ? "none" : answer.score >= 50 ? "good" : "some";
  return h("div", { class: "answer" },
    h("div", { class: "score " + level, title: "score in points" }, PAIR ? h("b", { class: "letter side" + number }, LETTER[number]) : null, h("b", {}, answer.score.toFixed(1)), meter),
    h("div", {}, answer.prediction === "" ? h("p", { class: "prediction empty" }, "(nothing)") : said("p", "prediction", answer.prediction),
      facts.length ? h("p", { class: "more" }, facts.map(([key, value]) => h("span", {}, visible(key) + " ", h("b", {}, visible(value))))) : null));
}

function demonstrations(list, unseen, who) {
  return h("div", { class: "demonstrations" }, h("span", { class: "label" }, `${who}${list.length} demonstrations, in order`),
    h("ol", {}, list.map((number) => {
      const shown = DATA.examples[number];
      return h("li", { title: visible(`${shown.id}: ${shown.answer}`) }, picture(shown.image, "", unseen), shown.question ? said("span", "asked", shown.question) : null, said("span", "", shown.answer));
    })));
}

function prompt(parts, list, image, who) {
  const pictures = [...list.map((number) => DATA.examples[number].image), image];
  const box = h("details", { class: "prompt" }, h("summary", {}, `${who}prompt`));
  box.addEventListener("toggle", () => {
    if (box.childElementCount > 1) return;
    let at = 0;
    box.append(h("pre", { dir: "auto" }, parts.map((part) => (part === null ? picture(pictures[at++], "mark") : visible(part))), h("span", { class: "goes" }, "\u258f")));
  });
  return box;
}

// -------------------------------------------------------------------------------------------------------------- page

let list = [];
let drawn = 0;
const items = h("ol", { class: "items" });
const end = h("p", { class: "end" });
const body = h("div", { class: "summary-place" });

function more(count) {
  for (const stop = Math.min(list.length, drawn + count); drawn < stop; drawn++) items.append(itemCard(list[drawn], drawn + 1));
  end.textContent = drawn < list.length ? `${list.length - drawn} more below` : list.length ? "" : "No item fits. Clear a filter (c).";
}

function show() {
  read();
  const task = DATA.tasks[state.task];
  list = chosen();
  drawn = 0;
  fill(controls.task, Object.keys(DATA.tasks).map((name) => [name, name]), state.task, (name) => go({ task: name, min: "", max: "", sort: MAIN, shots: Object.hasOwn(DATA.tasks[name].shots, state.shots) ? state.shots : Object.keys(DATA.tasks[name].shots).at(-1) }));
  fill(controls.shots, Object.keys(task.shots).map((k) => [k, k + "-shot"]), state.shots, (k) => go({ shots: k, min: "", max: "" }));
  controls.sort.replaceChildren(...fields(state).map(([key, name]) => h("option", { value: key, selected: key === state.sort }, key === "plan" ? name : name + " first")));
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
  const shots = (by) => controls.shots.querySelector(`[data-value="${step(Object.keys(DATA.tasks[state.task].shots), state.shots, by)}"]`).click();
  const tasks = (by) => { const name = step(Object.keys(DATA.tasks), state.task, by); [...controls.task.children].find((b) => b.dataset.value === name).click(); };
  const acts = {
    j: () => focusItem(current + 1), k: () => focusItem(Math.max(0, current - 1)), "/": () => controls.q.focus(), "?": help,
    o: () => items.children[current]?.querySelectorAll("details.prompt").forEach((box) => (box.open = !box.open)),
    "[": () => shots(-1), "]": () => shots(1), "{": () => tasks(-1), "}": () => tasks(1),
    z: () => controls.zero.click(), c: () => controls.reset.click(),
  };
  if (!Object.hasOwn(acts, event.key)) return;
  event.preventDefault();
  acts[event.key]();
});

document.body.append(h("main", {}, head(), toolbar(), body, items, end));
new IntersectionObserver((seen) => { if (seen.some((entry) => entry.isIntersecting) && drawn < list.length) more(CHUNK); }, { rootMargin: "1200px" }).observe(end);
addEventListener("hashchange", show);
addEventListener("beforeprint", () => more(list.length));
show();
