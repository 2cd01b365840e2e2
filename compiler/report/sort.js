"use strict";
const table = document.getElementById("layer-table");
const heads = [...table.tHead.rows[0].cells];

function sortBy(index, ascending) {
  const value = (body) => body.rows[0].cells[index].dataset.value;
  const bodies = [...table.tBodies].map((body) => [value(body), body]);
  const numbers = bodies.every(([text]) => text === "" || !Number.isNaN(Number(text)));
  const compare = (a, b) => (numbers ? Number(a) - Number(b) : a.localeCompare(b));
  bodies.sort(([a, first], [b, second]) => {
    if ((a === "") !== (b === "")) return a === "" ? 1 : -1; // the unknown comes last
    const order = ascending ? compare(a, b) : compare(b, a);
    return order || first.dataset.index - second.dataset.index;
  });
  table.append(...bodies.map(([, body]) => body));
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  heads[index].setAttribute("aria-sort", ascending ? "ascending" : "descending");
}

heads.forEach((head, index) => {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const ascending = head.getAttribute("aria-sort")
      ? head.getAttribute("aria-sort") === "descending"
      : !head.classList.contains("number"); // numbers: the largest first
    sortBy(index, ascending);
  });
});

document.getElementById("open-all").addEventListener("click", () => {
  const all = [...table.querySelectorAll("details")];
  const open = all.some((details) => !details.open);
  all.forEach((details) => (details.open = open));
});

// report.html#sort=us opens sorted; report.html#layer-3 opens that layer's explanation.
function follow() {
  const [, key] = location.hash.match(/^#sort=(\w+)$/) ?? [];
  const index = heads.findIndex((head) => head.dataset.key === key);
  if (index >= 0) sortBy(index, !heads[index].classList.contains("number"));
  const details = document.querySelector(`${/^#layer-\d+$/.test(location.hash) ? location.hash : "#none"} details`);
  if (details) details.open = true;
}
window.addEventListener("hashchange", follow);
follow();
document.documentElement.classList.add("scripted");
