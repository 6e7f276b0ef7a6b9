"use strict";

// Tables sort by the column whose head is pressed: the best first, then the other way round.
for (const table of document.querySelectorAll("table.measures")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    if (!head.dataset.sort) return;
    const button = document.createElement("button");
    button.append(...head.childNodes);
    button.firstElementChild.classList.add("arrow");
    head.append(button);
    button.addEventListener("click", () => {
      const natural = head.dataset.sort === "max" ? "descending" : "ascending";
      const opposite = natural === "ascending" ? "descending" : "ascending";
      const direction = head.getAttribute("aria-sort") === natural ? opposite : natural;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", direction);
      const sign = direction === "ascending" ? 1 : -1;
      const key = (row) => {
        const cell = row.cells[column];
        if (head.dataset.sort === "text") return cell.textContent;
        return cell.dataset.v === "" ? null : Number(cell.dataset.v);
      };
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
      });
      table.tBodies[0].append(...rows);
    });
  });
}

// Over a chart the legend shows the values there; over the legend a line stands out.
for (const figure of document.querySelectorAll("figure.plot")) {
  const chart = figure.querySelector("svg.chart");
  if (!chart) continue;
  const readings = JSON.parse(chart.dataset.readings);
  const mark = chart.querySelector(".reading");
  const at = figure.querySelector(".at");
  const label = chart.querySelector(".axis-title.middle").textContent;
  const items = [...figure.querySelectorAll(".legend li")];
  const usual = items.map((item) => item.querySelector("output").textContent);
  const still = () => {
    mark.setAttribute("visibility", "hidden");
    at.textContent = "";
    items.forEach((item, k) => { item.querySelector("output").textContent = usual[k]; });
  };
  const read = (event) => {
    const box = chart.getBoundingClientRect();
    const x = (event.clientX - box.left) * chart.viewBox.baseVal.width / box.width;
    const nearest = readings.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
    mark.setAttribute("transform", `translate(${nearest[0]} 0)`);
    mark.setAttribute("visibility", "visible");
    at.textContent = `at ${nearest[1]} (${label})`;
    items.forEach((item) => {
      item.querySelector("output").textContent = nearest[2][item.dataset.line] || "–";
    });
  };
  chart.addEventListener("pointermove", read);
  chart.addEventListener("pointerdown", read);
  chart.addEventListener("pointerleave", still);
  items.forEach((item) => {
    const line = chart.querySelector(`[data-line="${item.dataset.line}"]`);
    item.addEventListener("pointerenter", () => {
      chart.classList.add("chosen");
      if (line) line.classList.add("now");
    });
    item.addEventListener("pointerleave", () => {
      chart.classList.remove("chosen");
      if (line) line.classList.remove("now");
    });
  });
}
