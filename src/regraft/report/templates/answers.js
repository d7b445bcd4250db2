"use strict";
(() => {
  const { models, texts, rows } = JSON.parse(document.getElementById("answer-data").textContent);
  const form = document.getElementById("answer-filter");
  const list = document.getElementById("answer-list");
  const more = document.getElementById("answer-more");
  const PAGE = 30;
  let found = [];
  let shown = 0;

  const element = (tag, text = "", name = "") => {
    const made = document.createElement(tag);
    made.textContent = text;
    if (name) made.className = name;
    return made;
  };
  // An answer is [index of its text, outcome, reason].
  const request = (row) => (row.request === undefined ? "" : texts[row.request]);
  const symbol = (row, i) => (row.answers[i] ? row.answers[i][1][0] : ""); // ■, □ or ▨
  const conditions = {
    every: () => true,
    pruning: (row) => symbol(row, 0) !== symbol(row, 1),
    differing: (row) => new Set(row.answers.map((_, i) => symbol(row, i))).size > 1,
    realigning: (row) => models.length > 2 && symbol(row, 1) !== symbol(row, 2),
    broken: (row) => row.answers.some((answer) => /^(▨|■ refused,)/.test(answer[1])),
  };

  function matches(row, filter) {
    if (filter.kind && filter.kind !== (row.harmful ? "harmful" : "harmless")) return false;
    if (filter.category && filter.category !== row.category) return false;
    if (!conditions[filter.change || "every"](row)) return false;
    const sought = (filter.text || "").toLowerCase();
    if (!sought) return true;
    const answers = row.answers.map((answer) => texts[answer[0]]);
    const all = [row.id, texts[row.prompt], request(row), ...answers];
    return all.some((text) => text.toLowerCase().includes(sought));
  }

  function entry(row) {
    const box = element("details", "", row.harmful ? "example" : "example harmless");
    box.open = !row.harmful;
    const summary = element("summary");
    const asked = [element("span", texts[row.prompt], "prompt")];
    if (request(row)) asked.push(element("span", `Asks: ${request(row)}`, "asks"));
    if (!row.harmful) summary.append(...asked);
    const origin = [row.category || "no category", row.id, row.image].filter(Boolean).join(" · ");
    summary.append(element("span", origin, "origin"));
    const marks = element("span", "", "marks");
    const columns = element("div", "", "columns");
    row.answers.forEach(([text, mark, reason], i) => {
      const kind = { "■": "refused", "□": "complied" }[mark[0]] || "nothing";
      const short = element("span", `${models[i]}: `);
      short.append(element("span", mark, `mark ${kind}`));
      marks.append(short);
      const answer = element("div", "", "answer");
      answer.append(element("p", models[i], "who"));
      answer.append(element("p", reason ? `${mark}: “${reason}”` : mark, `mark ${kind}`));
      const quote = element("blockquote", texts[text] || "(blank)");
      quote.tabIndex = 0;
      answer.append(quote);
      columns.append(answer);
    });
    summary.append(marks);
    box.append(summary, ...(row.harmful ? asked : []), columns);
    return box;
  }

  function extend() {
    const next = found.slice(shown, shown + PAGE);
    list.append(...next.map(entry));
    shown += next.length;
    more.hidden = shown >= found.length;
    const plural = found.length === 1 ? "prompt" : "prompts";
    form.elements.count.value = `${found.length} of ${rows.length} ${plural}, ${shown} shown`;
  }

  function apply() {
    const filter = Object.fromEntries(new FormData(form));
    found = rows.filter((row) => matches(row, filter));
    shown = 0;
    list.replaceChildren();
    extend();
  }

  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", extend);
  // A link such as report.html#all-answers?kind=harmful&change=pruning opens with that filter.
  const initial = new URLSearchParams(location.hash.split("?")[1] || "");
  for (const [name, value] of initial) if (form.elements[name]) form.elements[name].value = value;
  apply();
  if (location.hash.includes("?")) document.getElementById("all-answers").scrollIntoView();
})();
