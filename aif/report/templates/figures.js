// Draws every panel when it comes near the screen, in the colours of the page, light or dark.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const drawn = new Set();
  const config = { displayModeBar: false, responsive: true };

  const themed = (layout) => {
    const css = getComputedStyle(document.documentElement);
    const color = (name) => css.getPropertyValue("--" + name).trim();
    const axis = (own = {}) => ({
      gridcolor: color("line"), zerolinecolor: color("edge"), linecolor: color("edge"), automargin: true,
      exponentformat: "power", spikecolor: color("faint"), spikethickness: 1,
      title: { ...(own.title || {}), standoff: 8, font: { size: 12, color: color("soft") } },
    });
    return {
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: css.fontFamily, size: 12, color: color("soft") },
      margin: { l: 48, r: 12, t: 10, b: 40 },
      showlegend: false, dragmode: false, hovermode: "x unified",
      hoverlabel: { namelength: -1, bgcolor: color("paper"), bordercolor: color("edge"), font: { color: color("ink") } },
      xaxis: { ...axis(layout.xaxis), fixedrange: true },
      yaxis: { ...axis(layout.yaxis), fixedrange: true },
    };
  };

  const draw = (node) => {
    const figure = figures[Number(node.dataset.figure)];
    drawn.add(node);
    Plotly.react(node, figure.data, themed(figure.layout), config);
  };

  const nodes = [...document.querySelectorAll(".plot")];
  const seen = (entries, observer) => entries.filter((e) => e.isIntersecting).forEach((e) => {
    observer.unobserve(e.target);
    draw(e.target);
  });
  const observer = new IntersectionObserver(seen, { rootMargin: "600px" });
  nodes.forEach((node) => observer.observe(node));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(draw));
  addEventListener("beforeprint", () => nodes.filter((node) => !drawn.has(node)).forEach(draw));
})();
