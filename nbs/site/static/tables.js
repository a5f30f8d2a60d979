// The ledger and the paper map: search, sort, pages. Without this script they are plain tables.
document.addEventListener("DOMContentLoaded", () => {
  const rows = new DataTable("table.rows", {pageLength: 50, lengthMenu: [50, 200, {label: "all", value: -1}], order: [], autoWidth: false});
  // a count above the table keeps the rows that it counts; once more, and all are back
  document.querySelectorAll("button[data-value]").forEach(button => button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    document.querySelectorAll("button[data-value]").forEach(b => b.setAttribute("aria-pressed", on && b === button));
    rows.column(".state").search(on ? `^${button.dataset.value}$` : "", true, false).draw();
  }));
  // a link to one paper, as in #paper-138, keeps its rows
  const keep = () => {
    const paper = location.hash.match(/^#paper-(\d+)$/);
    rows.search(paper ? `"paper ${paper[1]} "` : "").draw();
  };
  addEventListener("hashchange", keep);
  if (location.hash) keep();
});
