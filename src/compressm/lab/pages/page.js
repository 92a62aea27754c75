"use strict";
(() => {
  const root = document.documentElement;
  const trouble = (text) => {
    const line = document.getElementById("trouble");
    line.textContent = text;
    line.hidden = false;
  };

  const drawn = new Map(); // a chart's figure to a function that draws it as chosen
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const theme = (name) => {
    root.dataset.theme = name;
    for (const draw of drawn.values()) draw();
  };
  theme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
  document.getElementById("theme").addEventListener("click", () => {
    theme(root.dataset.theme === "dark" ? "light" : "dark");
  });

  // plotly.js and the charts' data lie in the page, compressed. They are unpacked when a chart is seen, or when the page
  // is there and the browser has nothing else to do, so that everything can be printed.
  if (typeof DecompressionStream === "undefined") {
    trouble("This browser is too old to draw the charts; the tables below are complete.");
    return;
  }
  const unpacked = (id) => {
    const characters = atob(document.getElementById(id).textContent);
    const packed = new Uint8Array(characters.length); // filled in a loop: a callback takes a second for plotly.js
    for (let i = 0; i < characters.length; i++) packed[i] = characters.charCodeAt(i);
    return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  let charts = null, loading = null;
  const load = () => loading ??= (async () => {
    const library = document.createElement("script");
    [library.textContent, charts] = [await unpacked("plotly"), JSON.parse(await unpacked("charts"))];
    document.head.append(library);
  })();
  window.addEventListener("load", () => (window.requestIdleCallback || setTimeout)(load));

  const colours = () => {
    const style = getComputedStyle(root);
    const ink = style.getPropertyValue("--ink").trim();
    const line = style.getPropertyValue("--line").trim();
    const axis = { gridcolor: line, linecolor: line, zerolinecolor: line, automargin: true };
    return { ink, axis };
  };
  const merged = (base, more) => {
    const out = { ...base };
    for (const [key, value] of Object.entries(more)) {
      const both = value && typeof value === "object" && !Array.isArray(value) && out[key] && typeof out[key] === "object";
      out[key] = both ? merged(out[key], value) : value;
    }
    return out;
  };
  const layoutOf = (chart, frame) => {
    const { ink, axis } = colours();
    let layout = {
      paper_bgcolor: "transparent", plot_bgcolor: "transparent", font: { color: ink, size: 12 },
      margin: { l: 50, r: 20, t: 10, b: 45 }, showlegend: false,
      xaxis: axis, yaxis: axis, hovermode: "closest",
    };
    if (chart.layout.yaxis2) layout.yaxis2 = axis;
    return merged(merged(layout, chart.layout), frame.layout);
  };

  const plain = (text) => new DOMParser().parseFromString(text, "text/html").body.textContent;

  // A legend beside the plot and not in it, where it would cover the axis on a narrow screen. A click hides a line.
  const legend = (list, traces, hidden, redraw) => {
    const shown = traces.filter((trace) => trace.name !== undefined && trace.showlegend !== false);
    const names = [...new Set(shown.map((trace) => trace.name))];
    list.replaceChildren(...(names.length < 2 ? [] : names).map((name) => {
      const { line, marker } = shown.find((trace) => trace.name === name);
      const key = document.createElement("button");
      key.type = "button";
      key.className = hidden.has(name) ? "hidden" : "";
      const dot = document.createElement("span");
      dot.style.background = (marker && typeof marker.color === "string" && marker.color) || (line && line.color);
      key.append(dot, plain(name));
      key.addEventListener("click", () => {
        if (!hidden.delete(name)) hidden.add(name);
        redraw();
      });
      return key;
    }));
  };

  const prepare = (figure) => {
    if (drawn.has(figure)) return null;
    const chart = charts[figure.dataset.chart];
    const names = Object.keys(chart.views);
    const controls = figure.querySelector(".controls");
    const plot = figure.querySelector(".plot");
    const keys = figure.querySelector(".legend");
    const hidden = new Set();
    let view = names[0], index = Math.max(0, chart.views[view].findIndex((frame) => frame.first));
    const slider = document.createElement("input");
    const label = document.createElement("output");
    const play = document.createElement("button");

    const draw = () => {
      const frames = chart.views[view];
      index = Math.min(index, frames.length - 1);
      slider.max = String(frames.length - 1);
      slider.value = String(index);
      slider.hidden = play.hidden = frames.length < 2;
      label.textContent = frames[index].label;
      const traces = frames[index].traces.map((trace) => ({ ...trace, visible: !hidden.has(trace.name) }));
      legend(keys, traces, hidden, draw);
      return Plotly.react(plot, traces, layoutOf(chart, frames[index]), {
        responsive: true, displaylogo: false, displayModeBar: false,
      });
    };

    if (names.length > 1) {
      const select = document.createElement("select");
      select.setAttribute("aria-label", "view");
      for (const name of names) {
        const option = document.createElement("option");
        option.value = name;
        option.textContent = plain(name);
        select.append(option);
      }
      select.addEventListener("change", () => { view = select.value; draw(); });
      controls.append(select);
    }
    if (names.some((name) => chart.views[name].length > 1)) {
      slider.type = "range";
      slider.min = "0";
      slider.step = "1";
      slider.setAttribute("aria-label", "which");
      slider.addEventListener("input", () => { index = Number(slider.value); draw(); });
      play.type = "button";
      play.textContent = "play";
      let timer = null;
      play.addEventListener("click", () => {
        if (timer !== null) {
          clearInterval(timer);
          timer = null;
          play.textContent = "play";
          return;
        }
        play.textContent = "stop";
        timer = setInterval(() => { index = (index + 1) % chart.views[view].length; draw(); }, 800);
      });
      controls.append(slider, play);
    }
    if (names.some((name) => chart.views[name].some((frame) => frame.label))) controls.append(label);
    drawn.set(figure, draw);
    return draw();
  };

  // Only what is looked at is drawn, one chart after the other: the page answers in between.
  let turn = Promise.resolve();
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      watcher.unobserve(entry.target);
      turn = turn.then(load).then(() => prepare(entry.target)).then(() => new Promise((next) => setTimeout(next)));
    }
  }, { rootMargin: "400px" });
  for (const figure of document.querySelectorAll(".chart")) watcher.observe(figure);

  // A printer sees every chart of the open sections, not only those that were looked at, and on white paper.
  let before = null;
  window.addEventListener("beforeprint", () => {
    before = root.dataset.theme;
    root.dataset.theme = "light";
    if (typeof Plotly === "undefined") return;
    for (const figure of document.querySelectorAll(".chart")) {
      if (figure.offsetParent !== null && !drawn.has(figure)) { watcher.unobserve(figure); prepare(figure); }
    }
    for (const draw of drawn.values()) draw();
  });
  window.addEventListener("afterprint", () => theme(before));
})();
