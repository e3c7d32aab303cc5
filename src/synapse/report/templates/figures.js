"use strict";
(() => {
  const settings = {
    responsive: true, displaylogo: false, displayModeBar: "hover", modeBarButtons: [["toImage"]], toImageButtonOptions: { format: "svg" },
  };
  const figures = [...document.querySelectorAll("figure[data-figure]")];

  // Figures name their colours as the style sheet does, so one figure serves light, dark and print.
  const painted = (part, styles) => {
    if (typeof part === "string") {
      const name = /^var\((--[a-z0-9-]+)\)$/.exec(part);
      return name ? styles.getPropertyValue(name[1]).trim() : part;
    }
    if (Array.isArray(part)) return part.map((inner) => painted(inner, styles));
    if (part === null || typeof part !== "object") return part;
    return Object.fromEntries(Object.entries(part).map(([key, inner]) => [key, painted(inner, styles)]));
  };

  const chosen = (figure) => [...figure.querySelectorAll("select")].map((select) => {
    select.parentElement.dataset.chosen = select.selectedOptions[0].textContent;
    return select.value;
  });

  const draw = (figure) => {
    const all = JSON.parse(figure.querySelector("script").textContent);
    const { data, layout } = painted(all[chosen(figure).join(",")], getComputedStyle(document.documentElement));
    return Plotly.react(figure.querySelector(".plot"), data, layout, settings);
  };
  const drawAll = () => figures.forEach(draw);

  const filter = (figure) => {
    const wanted = chosen(figure).join(",");
    figure.querySelectorAll("tbody tr").forEach((row) => { row.hidden = row.dataset.key !== wanted; });
  };

  figures.forEach((figure) => figure.addEventListener("change", () => draw(figure)));
  document.querySelectorAll("figure[data-rows]").forEach((figure) => {
    figure.addEventListener("change", () => filter(figure));
    filter(figure);
  });
  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  const printing = (on) => () => { document.documentElement.classList.toggle("printing", on); drawAll(); };
  addEventListener("beforeprint", printing(true));
  addEventListener("afterprint", printing(false));
})();
