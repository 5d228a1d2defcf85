(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const at = (id) => document.getElementById(id);
  const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`)?.value;

  /* One look for all plots, in the colours of the page. */
  const config = { responsive: true, displaylogo: false, displayModeBar: false };
  const template = () => {
    const axis = {
      title: { standoff: 10, font: { size: 13 } }, gridcolor: css("--line"), linecolor: css("--line"), zeroline: false,
      ticks: "", fixedrange: true, automargin: true,
    };
    return {
      layout: {
        margin: { l: 52, r: 14, t: 24, b: 44 },
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: css("--sans"), size: 13, color: css("--soft") },
        hoverlabel: {
          bgcolor: css("--ink"), bordercolor: css("--ink"), font: { color: css("--paper"), size: 13 }, align: "left", namelength: -1,
        },
        hovermode: "closest", dragmode: false, bargap: 0.25,
        colorway: [0, 1, 2, 3, 4, 5, 6].map((i) => css(`--c${i}`)),
        legend: { orientation: "h", x: 0, y: 1.12, yanchor: "bottom", traceorder: "normal" },
        annotationdefaults: { font: { size: 12, color: css("--soft") }, showarrow: false },
        xaxis: axis, yaxis: axis,
      },
      data: {
        heatmap: [{
          xgap: 1, ygap: 1, hoverongaps: false, colorscale: [[0, css("--heat-low")], [1, css("--heat-high")]],
          colorbar: { thickness: 10, outlinewidth: 0, len: 0.7, title: { font: { size: 12 } } },
        }],
        scatter: [{ marker: { size: 6 }, line: { width: 2 } }],
      },
    };
  };

  /* Panels of which a switch shows one, such as the axis that curves are drawn against. */
  const choose = () => document.querySelectorAll("[data-choice]").forEach((panel) => {
    panel.hidden = panel.dataset.value !== chosen(panel.dataset.choice);
  });

  /* What ran over an image: the slider and the switch give the heat map other values. */
  const showFrame = () => {
    const { rows, columns, views } = data.image_grid;
    const { frames, least, most } = views[Number(chosen("view") ?? 0)];
    const { label, values } = frames[Number(at("frame").value)];
    at("frame-label").textContent = label;
    const z = Array.from({ length: rows }, (_, row) => values.slice(row * columns, (row + 1) * columns));
    Plotly.restyle(at("plot-image_grid"), { z: [z], zmin: least, zmax: most }, [0]);
  };

  const draw = () => {
    choose();
    Object.entries(data.plots).forEach(([name, plot]) => {
      const place = at(`plot-${name}`);
      if (place.closest("[hidden]")) return;
      const { data: traces, layout } = structuredClone(plot);
      Plotly.react(place, traces, { ...layout, template: template() }, config);
    });
    if (data.image_grid) showFrame();
  };
  document.querySelectorAll('.choice input:not([name="score"])').forEach((input) => input.addEventListener("change", draw));
  at("frame")?.addEventListener("input", showFrame);
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  matchMedia("print").addEventListener("change", draw);
})();
