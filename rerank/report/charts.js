const charts = JSON.parse(document.getElementById("charts").textContent);
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
function draw() {
  const axis = {gridcolor: colour("--line"), zerolinecolor: colour("--muted"), automargin: true};
  charts.forEach((chart, place) => Plotly.react("chart" + place, chart.data, {
    ...chart.layout, autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {color: colour("--text"), family: "system-ui, sans-serif", size: 13},
    xaxis: {...axis, ...chart.layout.xaxis}, yaxis: {...axis, ...chart.layout.yaxis},
  }, {responsive: true, displayModeBar: false}));
}
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
