"use strict";

// Tables: a click on a heading sorts the rows by its column; cells without a figure stay last.
for (const table of document.querySelectorAll("table")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.firstElementChild.addEventListener("click", () => {
      const numeric = column > 0;
      const first = numeric ? "descending" : "ascending";
      const other = numeric ? "ascending" : "descending";
      const order = heading.getAttribute("aria-sort") === first ? other : first;
      headings.forEach((each) => each.setAttribute("aria-sort", each === heading ? order : "none"));
      const sign = order === "ascending" ? 1 : -1;
      const key = (row) => {
        const cell = row.cells[column];
        return numeric ? (cell.dataset.value === undefined ? null : Number(cell.dataset.value)) : cell.textContent;
      };
      const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        return sign * (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
      });
      table.tBodies[0].append(...rows.map(([, row]) => row));
    });
  });
}

// Overlays: the photograph is stored once; a copy of it lies under every mask.
for (const picture of document.querySelectorAll(".picture")) {
  const photo = picture.querySelector(".photo");
  for (const stack of picture.querySelectorAll(".stack")) {
    const copy = photo.cloneNode();
    copy.alt = "";
    stack.prepend(copy);
  }
}

const controls = document.querySelector(".controls");
if (controls) {
  controls.hidden = false;
  const opacity = controls.querySelector("input");
  const apply = () => document.documentElement.style.setProperty("--opacity", opacity.value / 100);
  opacity.addEventListener("input", apply);
  apply();
}

// Comparers: one picture, the left layer on one side of the slider and the right layer on the other.
const sides = document.querySelectorAll(".controls select");
const make = (name, className, parent) => {
  const element = document.createElement(name);
  element.className = className;
  parent.append(element);
  return element;
};
if (sides.length === 2) {
  for (const picture of document.querySelectorAll(".compared")) {
    const masks = new Map([...picture.querySelectorAll(".mask")].map((mask) => [mask.dataset.layer, mask]));
    const comparer = document.createElement("div");
    comparer.className = "comparer";
    const photo = picture.querySelector(".photo").cloneNode();
    comparer.append(photo);
    const images = ["left", "right"].map((side) => make("img", side, comparer));
    const names = ["from", "to"].map((side) => make("span", `side ${side}`, comparer));
    const slider = make("input", "", comparer);
    slider.type = "range";
    slider.max = 100;
    slider.value = 50;
    make("div", "divider", comparer);
    const move = () => comparer.style.setProperty("--x", `${slider.value}%`);
    slider.addEventListener("input", move);
    const choose = () => {
      sides.forEach((select, index) => {
        const mask = masks.get(select.value);
        images[index].src = mask.src;
        images[index].alt = mask.alt;
        images[index].className = `${mask.className} ${["left", "right"][index]}`;
        names[index].textContent = select.selectedOptions[0].textContent;
      });
      slider.setAttribute("aria-label", `boundary between ${names[0].textContent} (left) and ${names[1].textContent} (right)`);
    };
    sides.forEach((select) => select.addEventListener("change", choose));
    choose();
    move();
    picture.prepend(comparer);
  }
}
