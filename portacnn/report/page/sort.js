"use strict";
// Sorts a table by the column whose heading is pressed; again: the other way round.
for (const table of document.querySelectorAll("table.sorts")) {
  const heads = [...table.querySelectorAll("thead th")];
  const body = table.tBodies[0];
  const compare = new Intl.Collator(undefined, { numeric: true }).compare;
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const numbers = head.classList.contains("number");
      const before = head.getAttribute("aria-sort");
      const first = numbers ? "descending" : "ascending";
      const second = numbers ? "ascending" : "descending";
      const order = before === first ? second : first;
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const key = (row) => {
        const cell = row.cells[column];
        return numbers ? Number(cell.dataset.value) : cell.textContent;
      };
      const rows = [...body.rows].sort((a, b) =>
        sign * (numbers ? key(a) - key(b) : compare(key(a), key(b))));
      body.append(...rows);
    });
  });
}
