"use strict";
document.documentElement.classList.add("js");
for (const input of document.querySelectorAll(".search input")) {
  const rows = [...document.querySelectorAll("#" + input.dataset.table + " tbody tr")];
  const texts = rows.map(row => row.textContent.toLowerCase());
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    let n = 0;
    rows.forEach((row, i) => { row.hidden = !words.every(word => texts[i].includes(word)); n += !row.hidden; });
    input.parentElement.querySelector("output").textContent = n + " of " + rows.length + " rows";
  });
}
for (const table of document.querySelectorAll(".sortable")) {
  const body = table.tBodies[0];
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = row => row.cells[column].textContent;
      const compare = (a, b) => value(a).localeCompare(value(b), undefined, { numeric: true });
      const number = (a, b) => parseFloat(value(a)) - parseFloat(value(b));
      const by = [...body.rows].every(row => !isNaN(parseFloat(value(row)))) ? number : compare;
      body.append(...[...body.rows].sort((a, b) => (down ? -1 : 1) * by(a, b)));
    });
  });
}
for (const box of document.querySelectorAll(".scroll, .figures figure")) {
  const sign = document.createElement("p");
  sign.className = "note sideways";
  sign.textContent = "Wider than the page: scroll sideways \u2192";
  box.matches("figure") ? box.prepend(sign) : box.before(sign);
  const look = () => { sign.hidden = box.scrollWidth <= box.clientWidth + 1; };
  const sizes = new ResizeObserver(look);
  for (const part of [box, ...box.children]) sizes.observe(part);
}
for (const text of document.querySelectorAll(".tokens")) {
  const tokens = [...text.querySelectorAll(".token")];
  const at = new Map(tokens.map(token => [token.dataset.index, token]));
  const show = token => {
    for (const old of text.querySelectorAll(".source")) old.classList.remove("source");
    if (token) for (const place of token.dataset.from.split(" ")) at.get(place)?.classList.add("source");
  };
  tokens.forEach((token, i) => {
    token.tabIndex = i ? -1 : 0;
    token.addEventListener("mouseenter", () => show(token));
    token.addEventListener("mouseleave", () => show(tokens.includes(document.activeElement) ? document.activeElement : null));
    token.addEventListener("focus", () => { for (const other of tokens) other.tabIndex = other === token ? 0 : -1; show(token); });
    token.addEventListener("blur", () => show(null));
    token.addEventListener("keydown", event => {
      const goal = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tokens.length - 1 }[event.key];
      if (event.key === "Escape") token.blur();
      if (goal === undefined || !tokens[goal]) return;
      event.preventDefault();
      tokens[goal].focus();
    });
  });
}
for (const select of document.querySelectorAll(".choose select"))
  select.addEventListener("change", () => {
    for (const part of document.querySelectorAll("[data-run]")) part.classList.toggle("off", select.value !== "" && part.dataset.run !== select.value);
  });
for (const frame of document.querySelectorAll(".frame[data-points]")) {
  const series = JSON.parse(frame.dataset.points), [low, high] = JSON.parse(frame.dataset.span);
  const chart = frame.closest(".chart"), cursor = frame.querySelector(".cursor"), where = chart.querySelector(".where");
  const told = [...chart.querySelectorAll(".legend-of output")].map(output => [output, output.textContent]);
  const steps = [...new Set(series.flat().map(point => point[0]))].sort((a, b) => a - b);
  const show = event => {
    const box = frame.getBoundingClientRect(), x = low + (event.clientX - box.left) / box.width * (high - low);
    const step = steps.reduce((best, at) => Math.abs(at - x) < Math.abs(best - x) ? at : best, steps[0]);
    cursor.style.display = "block";
    cursor.style.left = 100 * (step - low) / (high - low) + "%";
    where.textContent = "at step " + step.toLocaleString("en");
    series.forEach((points, i) => { const at = points.filter(point => point[0] <= step).pop(); told[i][0].textContent = at ? at[1] : "-"; });
  };
  const leave = () => { cursor.style.display = "none"; where.textContent = ""; for (const [output, text] of told) output.textContent = text; };
  frame.addEventListener("pointermove", show);
  frame.addEventListener("pointerdown", show);
  frame.addEventListener("pointerleave", leave);
}
for (const line of document.querySelectorAll(".stale")) {
  const look = () => { if (Date.now() / 1000 - line.dataset.written > line.dataset.after) line.style.display = "block"; };
  look();
  setInterval(look, 5000);
}
