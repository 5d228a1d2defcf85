(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const at = (id) => document.getElementById(id);
  const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`)?.value;
  const onChoice = (name, act) =>
    document.querySelectorAll(`input[name="${name}"]`).forEach((input) => input.addEventListener("change", act));
  // Plotly reads a little HTML in its texts; names come from models and plug-ins.
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;");
  const short = (value) => (value == null ? "–" : Number(value.toPrecision(3)).toString());

  /* The stack: colours, and what the pointer is on. */
  const recolour = () => {
    const name = chosen("score");
    document.querySelectorAll(".stack .sublayer").forEach((sublayer) => {
      sublayer.style.setProperty("--level", JSON.parse(sublayer.dataset.levels)[name] ?? 0);
    });
    const score = data.scores[name];
    at("scale-low").textContent = score.low;
    at("scale-high").textContent = score.high;
    at("scale-meaning").textContent = `${score.meaning}; logarithmic scale`;
  };
  onChoice("score", recolour);

  const tip = at("tip");
  document.querySelectorAll(".stack").forEach((stack) => {
    const show = (event) => {
      const sublayer = event.target.closest(".sublayer");
      tip.hidden = !sublayer;
      if (!sublayer) return;
      const site = document.createElement("b");
      site.textContent = sublayer.dataset.site;
      tip.replaceChildren(site);
      JSON.parse(sublayer.dataset.facts).forEach((fact) => {
        const line = document.createElement("div");
        line.textContent = fact;
        tip.append(line);
      });
      const { offsetWidth: width, offsetHeight: height } = tip;
      tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
      tip.style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 18}px`;
    };
    stack.addEventListener("pointermove", show);
    stack.addEventListener("pointerdown", show);
    stack.addEventListener("pointerleave", () => { tip.hidden = true; });
  });

  /* Charts: one look, drawn again when the colours of the page change. */
  const config = { responsive: true, displaylogo: false, displayModeBar: false };
  const look = (more) => ({
    margin: { l: 52, r: 14, t: 10, b: 44 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: css("--sans"), size: 13, color: css("--soft") },
    hoverlabel: { bgcolor: css("--ink"), bordercolor: css("--ink"), font: { color: css("--paper"), size: 13 }, align: "left" },
    showlegend: false, hovermode: "closest", dragmode: false,
    ...more,
  });
  const axis = (title, more) => ({
    title: { text: title, standoff: 10, font: { size: 13 } }, gridcolor: css("--line"), linecolor: css("--line"), zeroline: false,
    ticks: "", fixedrange: true, automargin: true, ...more,
  });
  const marked = (x, more) => ({
    type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, layer: "below",
    line: { color: css("--soft"), width: 1, ...more },
  });
  const note = (x, text, more) => ({
    x, y: 1, xref: "x", yref: "paper", yanchor: "bottom", showarrow: false, text, font: { size: 12, color: css("--soft") }, ...more,
  });

  /* Fidelity against compression. */
  const SYMBOLS = { // by Plotly's names, as the legend draws them
    circle: "M4,0A4,4 0 1,1 -4,0A4,4 0 1,1 4,0Z", square: "M-4,-4H4V4H-4Z", diamond: "M0,-5.5L5.5,0L0,5.5L-5.5,0Z",
    "triangle-up": "M0,-5L5,4H-5Z", cross: "M-5,-2H-2V-5H2V-2H5V2H2V5H-2V2H-5Z", "triangle-down": "M0,5L5,-4H-5Z",
    hexagon: "M-5,0L-2.5,-4.5H2.5L5,0L2.5,4.5H-2.5Z",
  };
  const DASHES = ["solid", "dash", "dashdot", "longdash"];
  const AXES = { sublayers: "sublayers removed", predicted: "predicted decode speed-up", measured: "measured decode speed-up" };
  const hiddenCurves = new Set();
  const styleOf = (curve, index) => ({
    colour: css(`--c${index % 6}`), symbol: Object.keys(SYMBOLS)[index % 7],
    dash: curve.baseline ? "dot" : DASHES[Math.floor(index / 6) % DASHES.length],
  });
  const place = (point, across) => (across === "measured" ? point.measured?.median : point[across]) ?? null;
  const bars = (centres, lows, highs) => ({
    type: "data", symmetric: false, thickness: 1, width: 3,
    array: centres.map((centre, i) => (highs[i] == null ? 0 : highs[i] - centre)),
    arrayminus: centres.map((centre, i) => (lows[i] == null ? 0 : centre - lows[i])),
  });

  const curveTraces = (what, across) => {
    const traces = [];
    const front = [];
    data.curves.forEach((curve, index) => {
      if (hiddenCurves.has(curve.name)) return;
      const style = styleOf(curve, index);
      const points = curve.points.filter((point) => place(point, across) != null && point[what].mean != null)
        .sort((a, b) => place(a, across) - place(b, across));
      const x = points.map((point) => place(point, across));
      const y = points.map((point) => point[what].mean);
      const error = points.map((point) => point[what].error ?? 0);
      if (across === "measured") points.forEach((point, i) => point.pareto && front.push([x[i], y[i]]));
      traces.push({
        x, y, mode: "lines+markers", name: plain(curve.name),
        line: { color: style.colour, width: curve.best ? 2.25 : 1.25, dash: style.dash },
        marker: {
          symbol: style.symbol, size: points.map((point) => (point.chosen ? 10 : 7)), color: style.colour, opacity: 1,
          line: { color: css("--paper"), width: 1 },
        },
        error_y: { type: "data", array: error, color: style.colour, thickness: 1, width: 3 },
        ...(across === "measured" && {
          error_x: { ...bars(x, points.map((p) => p.measured.low), points.map((p) => p.measured.high)), color: style.colour },
        }),
        text: points.map((point, i) => [
          `<b>${plain(curve.name)}</b>, ${point.sublayers} sublayers removed${point.chosen ? ", its choice" : ""}`,
          `${what === "kl" ? "KL" : "perplexity"} ${short(y[i])}${error[i] ? ` ± ${short(error[i])}` : ""}`,
          `same top token ${point.top1 == null ? "–" : (100 * point.top1).toFixed(1)} %`,
          `speed-up ${point.measured ? point.measured.median.toFixed(2) : "–"}× measured, ${point.predicted.toFixed(2)}× predicted`,
        ].join("<br>")),
        hovertemplate: "%{text}<extra></extra>",
      });
      points.forEach((point, i) => {
        if (!point.chosen || !curve.best) return;
        traces.push({
          x: [x[i]], y: [y[i]], mode: "markers", hoverinfo: "skip",
          marker: { symbol: "circle-open", size: 21, color: css("--ink"), line: { width: 1.75 } },
        });
      });
    });
    if (front.length > 1 && data.curves.length > 1) {
      front.sort((a, b) => a[0] - b[0]);
      traces.unshift({
        x: front.map((p) => p[0]), y: front.map((p) => p[1]), mode: "lines", hoverinfo: "skip",
        line: { color: mix(css("--accent"), css("--paper"), 0.25), width: 11 },
      });
    }
    return traces;
  };
  const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const mix = (a, b, share) => {
    const [p, q] = [channels(a), channels(b)];
    return `rgb(${p.map((value, i) => Math.round(share * value + (1 - share) * q[i])).join(",")})`;
  };

  const drawCurves = () => {
    const across = chosen("axis");
    for (const what of ["kl", "perplexity"]) {
      const speed = across !== "sublayers";
      const all = data.curves.flatMap((curve) => curve.points.map((point) => point[what].mean)).filter((v) => v > 0);
      const wide = what === "perplexity" && Math.max(...all) > 20 * Math.min(...all);
      Plotly.react(at(`plot-${what}`), curveTraces(what, across), look({
        xaxis: axis(AXES[across], speed ? { ticksuffix: "×" } : { rangemode: "tozero" }),
        yaxis: axis("", wide ? { type: "log", dtick: "D2", tickformat: "~g" } : what === "kl" ? { rangemode: "tozero" } : {}),
        shapes: speed ? [marked(data.target, { dash: "dot" })] : [],
        annotations: speed ? [note(data.target, "target")] : [],
        margin: { l: 46, r: 14, t: 22, b: 44 },
      }), config);
    }
    drawLegend(across);
  };
  const drawLegend = (across) => {
    const SVG = document.querySelector("svg").namespaceURI;
    const legend = at("curve-legend");
    legend.replaceChildren();
    if (data.curves.length < 2) return;
    const shape = (name, attributes) => {
      const element = document.createElementNS(SVG, name);
      Object.entries(attributes).forEach(([key, value]) => element.setAttribute(key, value));
      return element;
    };
    data.curves.forEach((curve, index) => {
      const style = styleOf(curve, index);
      const button = document.createElement("button");
      button.type = "button";
      button.title = "show or hide";
      button.setAttribute("aria-pressed", String(!hiddenCurves.has(curve.name)));
      const line = shape("svg", { viewBox: "0 0 30 12", "aria-hidden": "true" });
      line.append(shape("line", {
        x1: 0, x2: 30, y1: 6, y2: 6, stroke: style.colour, "stroke-width": curve.best ? 2.5 : 1.5,
        "stroke-dasharray": { solid: "", dot: "2 3", dash: "6 4", dashdot: "6 3 2 3", longdash: "10 4" }[style.dash],
      }));
      line.append(shape("path", { d: SYMBOLS[style.symbol], transform: "translate(15 6)", fill: style.colour }));
      button.append(line, document.createTextNode(curve.name));
      button.addEventListener("click", () => {
        hiddenCurves.has(curve.name) ? hiddenCurves.delete(curve.name) : hiddenCurves.add(curve.name);
        drawCurves();
        at("curve-legend").children[index].focus();
      });
      legend.append(button);
    });
    if (across === "measured") {
      const key = document.createElement("button");
      key.type = "button";
      key.disabled = true;
      const line = shape("svg", { viewBox: "0 0 30 12", "aria-hidden": "true" });
      line.append(shape("line", { x1: 2, x2: 28, y1: 6, y2: 6, stroke: mix(css("--accent"), css("--paper"), 0.25), "stroke-width": 9 }));
      key.append(line, document.createTextNode("Pareto front"));
      legend.append(key);
    }
  };

  /* Speed. */
  const drawSpeed = () => {
    const rows = [...data.speed].reverse();
    const names = rows.map((row) => row.name);
    const x = rows.map((row) => row.measured.median);
    const predicted = rows.filter((row) => row.predicted != null);
    Plotly.react(at("plot-speed"), [
      {
        x, y: names, mode: "markers", marker: { size: 10, color: css("--accent") },
        error_x: { ...bars(x, rows.map((r) => r.measured.low), rows.map((r) => r.measured.high)), color: css("--accent"), thickness: 2, width: 5 },
        hovertemplate: rows.map((r) => `${r.name}<br>${r.measured.median.toFixed(2)}×, quartiles ${r.measured.low.toFixed(2)} to ${r.measured.high.toFixed(2)}<extra></extra>`),
      },
      {
        x: predicted.map((row) => row.predicted), y: predicted.map((row) => row.name), mode: "markers",
        marker: { symbol: "diamond-open", size: 12, color: css("--c1"), line: { width: 2 } },
        hovertemplate: "cost model: %{x:.2f}×<extra></extra>",
      },
    ], look({
      xaxis: axis("times as fast as the original", { ticksuffix: "×", range: speedRange(rows) }),
      yaxis: axis("", { gridcolor: "rgba(0,0,0,0)", range: [-0.6, names.length - 0.4] }),
      shapes: [marked(1), marked(data.target, { dash: "dot" })],
      annotations: [note(1, "original"), note(data.target, "target")],
      margin: { l: 110, r: 14, t: 24, b: 44 },
    }), config);
  };
  const speedRange = (rows) => {
    const all = rows.flatMap((row) => [row.measured.low, row.measured.high, row.predicted ?? 1]).concat(1, data.target);
    const [low, high] = [Math.min(...all), Math.max(...all)];
    const room = 0.08 * (high - low || 1);
    return [low - room, high + room];
  };

  /* Quantisation beside cutting: as large as the weights. */
  const drawVariants = (models) => {
    const x = models.map((model) => model.speed.median);
    const y = models.map((model) => model.kl.mean);
    const most = Math.max(...models.map((model) => model.bytes));
    const colours = models.map((model) => css(model.quantised ? "--c1" : "--accent"));
    Plotly.react(at("plot-variants"), [{
      x, y, mode: "markers+text", text: models.map((model) => plain(model.name)), textposition: "top center", cliponaxis: false,
      textfont: { color: css("--ink"), size: 12 },
      marker: { size: models.map((model) => 34 * Math.sqrt(model.bytes / most)), color: colours, opacity: 0.75, line: { width: 0 } },
      error_x: { ...bars(x, models.map((m) => m.speed.low), models.map((m) => m.speed.high)), color: css("--soft") },
      error_y: { type: "data", array: models.map((m) => m.kl.error ?? 0), color: css("--soft"), thickness: 1, width: 3 },
      hovertemplate: models.map((m) => `<b>${plain(m.name)}</b><br>${m.speed.median.toFixed(2)}×, KL ${short(m.kl.mean)}<br>weights ${m.size}<extra></extra>`),
    }], look({
      xaxis: axis("times as fast as the original, decoding", { ticksuffix: "×" }), yaxis: axis("KL from the original, nats"),
      margin: { l: 58, r: 40, t: 34, b: 44 },
    }), config);
  };

  /* The depth page. */
  const drawBars = (panel) => {
    const x = panel.values.map((_, layer) => layer);
    Plotly.react(at(`plot-${panel.name}`), [{
      x, y: panel.values, type: "bar", marker: { color: css("--accent") },
      hovertemplate: "%{x}: %{y:.4g}<extra></extra>",
    }], look({
      bargap: 0.25, xaxis: axis(panel.axis), yaxis: axis("", panel.log ? { type: "log", dtick: "D2", tickformat: "~g" } : {}),
    }), config);
  };
  const drawLines = (panel) => {
    Plotly.react(at(`plot-${panel.name}`), panel.series.map((line, i) => ({
      x: line.values.map((_, layer) => layer), y: line.values, name: line.name, mode: "lines+markers", marker: { size: 4 },
      line: { color: css(`--c${i}`), width: 1.75 }, hovertemplate: `%{x}: ${line.name} %{y:.3g}<extra></extra>`,
    })), look({
      showlegend: panel.series.length > 1, legend: { orientation: "h", y: 1.15 },
      xaxis: axis(panel.axis), yaxis: axis("", panel.log ? { type: "log", dtick: "D2", tickformat: "~g" } : {}),
    }), config);
  };
  const named = (texts) => ({ tickvals: texts.map((_, i) => i), ticktext: texts.map(plain), tickangle: -60, tickfont: { size: 10 } });
  const drawHeat = (panel) => {
    Plotly.react(at(`plot-${panel.name}`), [{
      z: panel.values, type: "heatmap", xgap: 1, ygap: 1, hoverongaps: false, zmin: 0, zmax: panel.most,
      colorscale: [[0, css("--heat-low")], [1, css("--heat-high")]],
      colorbar: { thickness: 10, outlinewidth: 0, len: 0.7, tickfont: { color: css("--soft") } },
      hovertemplate: `${plain(panel.y)} %{y}<br>${plain(panel.x)} %{x}<br>%{z:.3g}<extra></extra>`,
    }, {
      x: (panel.dots ?? []).map(([x]) => x), y: (panel.dots ?? []).map(([, y]) => y), mode: "markers", hoverinfo: "skip",
      marker: { size: 5, color: css("--c1") },
    }], look({
      xaxis: axis(plain(panel.x), { showgrid: false, ...(panel.labels && named(panel.labels)) }), yaxis: axis(plain(panel.y), { showgrid: false, autorange: "reversed" }),
    }), config);
  };
  const drawAngles = () => {
    const values = data.angles;
    const closest = values[0].map((_, length) => {
      const starts = values.map((row) => row[length]);
      const known = starts.filter((value) => value != null);
      return known.length ? starts.indexOf(Math.min(...known)) : null;
    }).slice(1);
    const z = values[0].map((_, length) => values.map((row) => row[length])).slice(1);
    const lengths = z.map((_, i) => i + 1);
    Plotly.react(at("plot-angles"), [
      {
        z, y: lengths, type: "heatmap", xgap: 1, ygap: 1, hoverongaps: false,
        colorscale: [[0, css("--heat-low")], [1, css("--heat-high")]],
        colorbar: { thickness: 10, outlinewidth: 0, len: 0.7, tickfont: { color: css("--soft") } },
        hovertemplate: "%{y} layers from layer %{x}<br>angular distance %{z:.3f}<extra></extra>",
      },
      { x: closest, y: lengths, mode: "lines+markers", line: { color: css("--c1"), width: 1.25 }, marker: { size: 5 }, hoverinfo: "skip" },
    ], look({ xaxis: axis("first layer of the run", { showgrid: false }), yaxis: axis("layers in the run", { showgrid: false }) }), config);
  };

  /* The trace page. */
  const drawTrace = ({ tokens, states, names, notes, shown }) => {
    const layers = states[0].map((_, layer) => layer);
    const facts = (layer, column) => [
      `layer ${layer}: ${names[states[column][layer]]}`,
      `“${plain(tokens[column].text)}” → “${plain(tokens[column].next)}”`,
      ...Object.entries(notes).map(([name, rows]) => `${plain(name)} ${short(rows[column][layer])}`),
    ].join("<br>");
    const edges = tokens.flatMap((token, i) => (i && token.phase !== tokens[i - 1].phase ? [i - 0.5] : []));
    const mix = (share) => `color-mix(in oklab, ${css("--heat-low")}, ${css("--heat-high")} ${share}%)`;
    const probe = document.body.appendChild(document.createElement("span"));
    const colour = (share) => { probe.style.color = mix(share); return getComputedStyle(probe).color; };
    const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgb = (share) => {
      context.fillStyle = colour(share);
      context.fillRect(0, 0, 1, 1);
      return `rgb(${[...context.getImageData(0, 0, 1, 1).data].slice(0, 3).join(",")})`;
    };
    const steps = [0, 45, 70, 100].flatMap((share, i) => [[i / 4, rgb(share)], [(i + 1) / 4, rgb(share)]]);
    const values = shown ? notes[shown] : states;  // where all layers ran, what else tells tokens apart
    const scale = shown
      ? { zmin: 0, zmax: Math.max(...values.flat()), colorscale: [[0, rgb(0)], [1, rgb(100)]] }
      : { zmin: -0.5, zmax: 3.5, colorscale: steps };
    probe.remove();
    const ticks = shown ? { title: { text: plain(shown) } } : { tickvals: [0, 1, 2, 3], ticktext: names };
    Plotly.react(at("plot-trace"), [{
      z: layers.map((layer) => values.map((row) => row[layer])), text: layers.map((layer) => states.map((_, column) => facts(layer, column))),
      type: "heatmap", ...scale, xgap: 1, ygap: 1, hovertemplate: "%{text}<extra></extra>",
      colorbar: { thickness: 10, outlinewidth: 0, len: 0.6, ...ticks, tickfont: { color: css("--soft") } },
    }], look({
      margin: { l: 52, r: 14, t: 10, b: 96 },
      xaxis: axis("", { showgrid: false, ...named(tokens.map((token) => token.text)) }),
      yaxis: axis("layer", { showgrid: false }),
      shapes: edges.map((x) => ({ type: "line", x0: x, x1: x, y0: -0.5, y1: layers.length - 0.5, line: { color: css("--c1"), width: 2 } })),
    }), config);
  };

  const drawPicture = ({ source, rows, columns, views }) => {
    const { frames, least, most } = views[Number(chosen("view") ?? 0)];
    const { label, values } = frames[Number(at("frame").value)];
    at("frame-label").textContent = label;
    const z = Array.from({ length: rows }, (_, row) => values.slice(row * columns, (row + 1) * columns));
    Plotly.react(at("plot-picture"), [{
      z, type: "heatmap", zmin: least, zmax: most, hoverongaps: false, hovertemplate: "row %{y}, column %{x}: %{z:.3g}<extra></extra>",
      colorscale: [[0, "rgba(12,14,20,0.92)"], [1, "rgba(12,14,20,0)"]], showscale: false,
    }], look({
      images: [{ source, xref: "x", yref: "y", x: -0.5, y: -0.5, sizex: columns, sizey: rows, sizing: "stretch", layer: "below" }],
      xaxis: axis("", { visible: false, range: [-0.5, columns - 0.5] }),
      yaxis: axis("", { visible: false, range: [rows - 0.5, -0.5], scaleanchor: "x" }),
    }), config);
  };

  /* The healing page. */
  const drawTraining = ({ curve, names }, place = "plot-training") => {
    const steps = curve.map((point) => point.step);
    Plotly.react(at(place), names.map((name, i) => ({
      x: steps, y: curve.map((point) => point[name]), name, mode: "lines",
      line: { color: css(`--c${1 + (i % 4)}`), width: i ? 1.25 : 2 }, hovertemplate: `step %{x}: ${plain(name)} %{y:.4g}<extra></extra>`,
    })), look({ showlegend: names.length > 1, xaxis: axis("step"), yaxis: axis("") }), config);
  };

  /* The restoration page. */
  const interval = ({ interval: [start, stop] }) => (start === stop ? "none" : `layers ${start} to ${stop - 1}`);
  const figures = (point) => `Q ${short(point.quality)}, D ${short(point.diversity)}`;
  const drawIntervals = ({ points, layers, chosen: [start, stop] }, what) => {
    const z = Array.from({ length: layers }, () => Array(layers).fill(null));
    const text = Array.from({ length: layers }, () => Array(layers).fill(""));
    points.forEach((point) => {
      const [first, end] = point.interval;
      z[end - 1][first] = point[what];
      text[end - 1][first] = `${interval(point)}<br>${figures(point)}${point.feasible ? "" : "<br>below the floor"}`;
    });
    Plotly.react(at(`plot-intervals-${what}`), [{
      z, text, type: "heatmap", xgap: 1, ygap: 1, hoverongaps: false, hovertemplate: "%{text}<extra></extra>",
      colorscale: [[0, css("--heat-low")], [1, css("--heat-high")]],
      colorbar: { thickness: 10, outlinewidth: 0, len: 0.7, tickfont: { color: css("--soft") } },
    }], look({
      xaxis: axis("first restored layer", { showgrid: false }), yaxis: axis("last restored layer", { showgrid: false }),
      shapes: start === stop ? [] : [{
        type: "rect", x0: start - 0.5, x1: start + 0.5, y0: stop - 1.5, y1: stop - 0.5, line: { color: css("--c1"), width: 2.5 },
      }],
    }), config);
  };
  const drawPlane = ({ points, soups, marked: models, floor }) => {
    const traces = [true, false].map((feasible) => {
      const some = points.filter((point) => point.feasible === feasible);
      return {
        x: some.map((p) => p.quality), y: some.map((p) => p.diversity), mode: "markers", name: feasible ? "interval" : "interval below the floor",
        marker: { size: 7, color: css(feasible ? "--accent" : "--line"), line: { color: css("--soft"), width: feasible ? 0 : 1 } },
        text: some.map((p) => `${interval(p)}<br>${figures(p)}`), hovertemplate: "%{text}<extra></extra>",
      };
    });
    Object.entries(soups).forEach(([name, curve], i) => traces.push({
      x: curve.map((p) => p.quality), y: curve.map((p) => p.diversity), mode: "lines+markers", name: plain(name),
      line: { color: css(`--c${i + 1}`), width: 1.5 }, marker: { size: 4 },
      text: curve.map((p) => `${plain(name)}, ${short(p.share)} of pre<br>${figures(p)}`), hovertemplate: "%{text}<extra></extra>",
    }));
    const named = Object.entries(models);
    traces.push({
      x: named.map(([, p]) => p.quality), y: named.map(([, p]) => p.diversity), mode: "markers+text", showlegend: false, hoverinfo: "skip",
      text: named.map(([name]) => plain(name)), textposition: "top center", textfont: { color: css("--ink"), size: 12 },
      marker: { symbol: "circle-open", size: 15, color: css("--ink"), line: { width: 1.75 } },
    });
    Plotly.react(at("plot-plane"), traces, look({
      showlegend: true, legend: { orientation: "h", y: -0.18 }, xaxis: axis("Q, mass on valid answers"), yaxis: axis("D, diversity of valid answers"),
      shapes: [marked(floor, { dash: "dot" })], annotations: [note(floor, "floor")], margin: { l: 52, r: 14, t: 24, b: 44 },
    }), config);
  };

  /* The repair page. */
  const drawLayers = ({ layers, steps, chosen, shares, values }) => {
    const rows = Array.from({ length: layers }, (_, layer) => layer);
    const heat = {
      x: steps, y: rows, z: rows.map((layer) => shares.map((row) => row[layer])), type: "heatmap", zmin: 0, zmax: 1,
      text: rows.map((layer) => steps.map((step, i) => `step ${step}, layer ${layer}: ${short(values[i]?.[layer])}`)),
      colorscale: [[0, css("--heat-low")], [1, css("--heat-high")]], hovertemplate: "%{text}<extra></extra>",
      colorbar: { thickness: 10, outlinewidth: 0, len: 0.7, tickfont: { color: css("--soft") } },
    };
    const dots = {
      x: steps, y: chosen, mode: "markers", marker: { size: 5, color: css("--c1") }, hovertemplate: "step %{x}: layer %{y} was trained<extra></extra>",
    };
    Plotly.react(at("plot-layers"), shares.length ? [heat, dots] : [dots], look({
      xaxis: axis("step", { showgrid: false }), yaxis: axis("layer", { showgrid: false, range: [-0.5, layers - 0.5] }),
    }), config);
  };
  const drawRepair = ({ chosen, profile, curves }) => {
    if (chosen) drawLayers(chosen);
    Plotly.react(at("plot-profile"), Object.entries(profile).map(([name, values], i) => ({
      x: values.map((_, layer) => layer), y: values, name, type: "bar", marker: { color: css(`--c${[1, 0, 6][i]}`) },
      hovertemplate: `layer %{x}, ${plain(name)} text: %{y:.4g}<extra></extra>`,
    })), look({ showlegend: true, bargap: 0.3, xaxis: axis("layer"), yaxis: axis("") }), config);
    Object.entries(curves).forEach(([name, curve]) => drawTraining(curve, `plot-${name}`));
  };

  const draw = () => {
    if (data.intervals) ["diversity", "quality"].forEach((what) => drawIntervals(data.intervals, what));
    if (data.plane) drawPlane(data.plane);
    if (data.training) drawTraining(data.training);
    if (data.repair) drawRepair(data.repair);
    if (data.trace) drawTrace(data.trace);
    if (data.picture) drawPicture(data.picture);
    if (data.curves) { drawCurves(); drawSpeed(); }
    if (data.variants?.length) drawVariants(data.variants);
    if (data.bars) data.bars.forEach(drawBars);
    if (data.lines) data.lines.forEach(drawLines);
    if (data.heats) data.heats.forEach(drawHeat);
    if (data.maps) drawHeat(data.maps);
    if (data.angles) drawAngles();
  };
  onChoice("axis", drawCurves);
  onChoice("view", () => drawPicture(data.picture));
  at("frame")?.addEventListener("input", () => drawPicture(data.picture));
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  matchMedia("print").addEventListener("change", draw);
})();
