// The first half of eval/browse_page.py's script: elements, the page's head and an item's card. Text is only ever set as text.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);
const PAIR = DATA.sides.length === 2;
const MAIN = PAIR ? "difference" : "score"; // what the histogram, the range and the default order are about
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
const visible = (text) =>
  String(text).replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)));
const said = (tag, name, text) => h(tag, { class: name, dir: "auto" }, visible(text));
const fixed = (value, digits) => (value < 0 ? "\u2212" : "") + Math.abs(value).toFixed(digits);
const signed = (value, digits) => (value > 0 ? "+" : "") + fixed(value, digits);
const plain = (value) => (typeof value === "number" ? fixed(value, Number.isInteger(value) ? 0 : 3) : String(value));
const words = (key) => key.replaceAll("_", " ");
const metric = (name) => (name === "cider_d" ? "CIDEr-D" : name);
const error = (se) => (se === null ? "error n/a" : "\u00b1 " + se.toFixed(1));

// -------------------------------------------------------------------------------------------------------------- head

function head() {
  const sides = DATA.sides.map((side, number) => {
    const control = side.control ? h("span", { class: "control" }, `control: images ${side.control}`) : null;
    const letter = PAIR ? h("b", { class: "letter side" + number }, LETTER[number]) : null;
    return h("span", { class: "run" }, letter, side.label, control);
  });
  const banners = DATA.sides
    .filter((side) => side.missing.length)
    .map((side) => h("p", { class: "banner" }, `${side.label} is not finished. Not on this page: ${side.missing.join(", ")}.`));
  const plans = new Set(DATA.sides.map((side) => side.facts.plan));
  if (plans.size > 1)
    banners.push(
      h(
        "p",
        { class: "banner" },
        "The two have different plans: compared are the items that both were asked, after the demonstrations that each had.",
      ),
    );
  const keys = Object.keys(DATA.sides[0].facts);
  const table = h(
    "table",
    { class: "facts" },
    PAIR
      ? h(
          "tr",
          {},
          h("th", {}),
          DATA.sides.map((side, number) => h("th", {}, `${LETTER[number]}: ${side.label}`)),
        )
      : null,
    keys.map((key) =>
      h(
        "tr",
        {},
        h("th", {}, key),
        DATA.sides.map((side) => said("td", "", side.facts[key])),
      ),
    ),
  );
  const line = ["plan", "seed", "demonstrations", "sample", "images", "corpus"].map((key) => {
    const values = [...new Set(DATA.sides.map((side) => side.facts[key]))].map((value) =>
      key === "plan" ? value.slice(0, 12) : visible(value),
    );
    return `${key} ${values.join(" / ")}`;
  });
  return h(
    "header",
    {},
    h("h1", {}, sides),
    h("p", { class: "line" }, line.join(" \u00b7 ")),
    banners,
    h("details", { class: "about" }, h("summary", {}, "About this evaluation"), table),
  );
}

function summary() {
  const task = DATA.tasks[state.task];
  const cell = task.shots[state.shots];
  const cards = cell.sides.map((side, number) =>
    card(side.mean.toFixed(1), error(side.se), PAIR ? LETTER[number] + ", mean" : "mean score", "side" + number),
  );
  if (PAIR) cards.push(card(signed(cell.difference.mean, 1), error(cell.difference.se), "B \u2212 A, paired"));
  const n = cell.sides[0];
  cards.push(
    card(n.n.toLocaleString("en"), "", n.clusters < n.n ? `items, ${n.clusters.toLocaleString("en")} images` : "items"),
  );
  if (task.chance !== null) cards.push(card(task.chance.toFixed(1), "", "chance"));
  const prompts = [...new Set(task.prompts)].join(" and ");
  const held = task.items.length.toLocaleString("en");
  const part = task.items.length < task.of ? ` This page holds ${held} of the items; means and bars are of all of them.` : "";
  return h(
    "section",
    { class: "summary" },
    h(
      "div",
      {},
      h("div", { class: "cards" }, cards),
      h(
        "p",
        { class: "note" },
        `${state.task}, ${state.shots}-shot: ${metric(task.metric)}, in points; ${prompts} prompts. ` +
          `Means \u00b1 standard errors clustered by image.${part}`,
      ),
    ),
    h(
      "figure",
      {},
      bars(cell.histogram),
      h(
        "figcaption",
        {},
        (PAIR ? "differences B \u2212 A of all, none in grey" : "scores of all, zeros in red") +
          "; click a bar for its items",
      ),
    ),
  );
}

const card = (value, extra, name, side) =>
  h("div", { class: side }, h("b", {}, value, extra ? h("small", {}, extra) : null), h("span", {}, name));

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
    const bar = (name, top, size) =>
      h("rect", { class: name, x: i * step + 0.75, y: height - top, width: Math.max(1, step - 1.5), height: size, rx: 1.5 });
    root.append(
      h(
        "g",
        {
          class: `bin ${kind}${on ? " on" : ""}`,
          tabindex: count ? 0 : null,
          role: "button",
          "data-from": from,
          onclick: choose,
          onkeydown: (event) => {
            if (event.key === "Enter" || event.key === " ") {
              event.preventDefault();
              choose();
            }
          },
        },
        h("title", {}, `${count} items from ${from} to ${to}${zeros ? `, ${histogram.zeros} of them exactly 0` : ""}`),
        h("rect", { class: "hit", x: i * step, y: 0, width: step, height }),
        bar("bar", tall, tall - zeros),
        bar(PAIR ? "bar same" : "bar nil", zeros, zeros),
      ),
    );
  });
  root.append(h("line", { x1: 0, x2: width, y1: height + 0.5, y2: height + 0.5 }));
  const zero = edges.indexOf(0);
  const marks = zero > 0 ? [0, zero, edges.length - 1] : [0, Math.floor((edges.length - 1) / 2), edges.length - 1];
  for (const i of marks)
    root.append(
      h(
        "text",
        { x: i * step, y: height + 12, "text-anchor": i === 0 ? "start" : i === edges.length - 1 ? "end" : "middle" },
        plain(edges[i]),
      ),
    );
  return root;
}

// ------------------------------------------------------------------------------------------------------------- cards

const picture = (number, name, unseen) =>
  h("img", {
    src: DATA.images[number],
    alt: "",
    class: name + (unseen ? " unseen" : ""),
    decoding: "async",
    title: unseen ? "not shown to the model" : null,
  });

function itemCard(row, rank) {
  const { item, answers } = row;
  const [first, second] = answers;
  const swapped = answers.map((answer) => answer.image !== null && answer.image !== item.image);
  const blind = answers.every((answer) => answer.image === null);
  const image = h(
    "div",
    { class: "query" },
    picture(item.image, "own", blind || swapped.every(Boolean)),
    blind ? h("small", {}, "no image was shown") : null,
    answers.map((answer, number) =>
      swapped[number]
        ? h(
            "figure",
            { class: "swap" },
            picture(answer.image, ""),
            h("figcaption", {}, (PAIR ? LETTER[number] + " was " : "") + "shown this instead"),
          )
        : null,
    ),
    PAIR && !blind
      ? answers.map((answer, number) => (answer.image === null ? h("small", {}, `${LETTER[number]} was shown no image`) : null))
      : null,
  );
  const own = (number, key) => answers[number][key] ?? first[key];
  const shared = !second || !("demonstrations" in second);
  return h(
    "li",
    { class: "item", tabindex: -1, "data-id": item.id, "data-rank": rank },
    h(
      "div",
      { class: "title" },
      h("span", {}, `${rank}`),
      h(
        "a",
        {
          href: "#" + new URLSearchParams({ task: state.task, shots: state.shots, item: item.id }),
          title: "a link to this item",
        },
        visible(item.id),
      ),
      PAIR
        ? h(
            "b",
            { class: "change " + (row.difference < 0 ? "worse" : row.difference > 0 ? "better" : "") },
            signed(row.difference, 1),
          )
        : null,
    ),
    image,
    h(
      "div",
      { class: "text" },
      item.question ? said("p", "question", item.question) : null,
      h(
        "div",
        { class: "answers" },
        answers.map((answer, number) => answerBlock(answer, number)),
      ),
      h(
        "div",
        { class: "references" },
        h("span", { class: "label" }, DATA.tasks[state.task].kind === "vqa" ? "answers" : "references"),
        item.references.map(([text, count]) =>
          h("span", { class: "reference", dir: "auto" }, visible(text), count > 1 ? h("i", {}, "\u00d7" + count) : null),
        ),
      ),
      answers.map((_, number) => {
        if (number && shared) return null;
        const list = own(number, "demonstrations");
        return list.length
          ? demonstrations(list, answers[number].image === null, PAIR && !shared ? LETTER[number] + ": " : "")
          : null;
      }),
      answers.map((_, number) => {
        if (number && !("prompt" in second) && shared && second.image === first.image) return null;
        const only = second && !("prompt" in second) && shared && second.image === first.image;
        return prompt(
          own(number, "prompt"),
          own(number, "demonstrations"),
          answers[number].image,
          PAIR && !only ? LETTER[number] + ": " : "",
        );
      }),
    ),
  );
}

function answerBlock(answer, number) {
  const cell = DATA.tasks[state.task].shots[state.shots];
  // CIDEr-D goes to 1000
  const top = (cell.top ??= Math.max(100, ...cell.sides.flatMap((side) => side.answers.map((a) => a.score))));
  const meter = h(
    "svg",
    { class: "meter", viewBox: "0 0 100 4", preserveAspectRatio: "none", "aria-hidden": "true" },
    h("rect", { class: "track", width: 100, height: 4, rx: 2 }),
    h("rect", { width: Math.min(100, (100 * answer.score) / top), height: 4, rx: 2 }),
  );
  const facts = typeof answer.logprob === "number" ? [["logprob", plain(answer.logprob)]] : [];
  for (const [key, value] of Object.entries(answer.more))
    if (value !== null && typeof value === "object" && !Array.isArray(value))
      for (const [name, held] of Object.entries(value)) facts.push([name, plain(held)]);
    else if (value !== null) facts.push([words(key), plain(value)]);
  const level = answer.score === 0 ? "none" : answer.score >= 50 ? "good" : "some";
  return h(
    "div",
    { class: "answer" },
    h(
      "div",
      { class: "score " + level, title: "score in points" },
      PAIR ? h("b", { class: "letter side" + number }, LETTER[number]) : null,
      h("b", {}, answer.score.toFixed(1)),
      meter,
    ),
    h(
      "div",
      {},
      answer.prediction === ""
        ? h("p", { class: "prediction empty" }, "(nothing)")
        : said("p", "prediction", answer.prediction),
      facts.length
        ? h(
            "p",
            { class: "more" },
            facts.map(([key, value]) => h("span", {}, visible(key) + " ", h("b", {}, visible(value)))),
          )
        : null,
    ),
  );
}

function demonstrations(list, unseen, who) {
  return h(
    "div",
    { class: "demonstrations" },
    h("span", { class: "label" }, `${who}${list.length} demonstrations, in order`),
    h(
      "ol",
      {},
      list.map((number) => {
        const shown = DATA.examples[number];
        return h(
          "li",
          { title: visible(`${shown.id}: ${shown.answer}`) },
          picture(shown.image, "", unseen),
          shown.question ? said("span", "asked", shown.question) : null,
          said("span", "", shown.answer),
        );
      }),
    ),
  );
}

function prompt(parts, list, image, who) {
  const pictures = [...list.map((number) => DATA.examples[number].image), image];
  const box = h("details", { class: "prompt" }, h("summary", {}, `${who}prompt`));
  box.addEventListener("toggle", () => {
    if (box.childElementCount > 1) return;
    let at = 0;
    box.append(
      h(
        "pre",
        { dir: "auto" },
        parts.map((part) => (part === null ? picture(pictures[at++], "mark") : visible(part))),
        h("span", { class: "goes" }, "\u258f"),
      ),
    );
  });
  return box;
}
