"use strict";
// Nothing here is needed to read the page: a slider over two pictures, figures under the pointer, copying.

for (const pair of document.querySelectorAll(".pair")) {
  const [before, after] = pair.querySelectorAll("img");
  if (!after || before.width * after.height !== before.height * after.width) continue;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Slider";
  button.setAttribute("aria-pressed", "false");
  const slider = document.createElement("input");
  slider.type = "range";
  slider.value = 50;
  slider.setAttribute("aria-label", "how much of the picture before training is shown, in per cent");
  slider.addEventListener("input", () => pair.style.setProperty("--at", slider.value + "%"));
  button.addEventListener("click", () => {
    const on = pair.classList.toggle("slide");
    button.textContent = on ? "Side by side" : "Slider";
    button.setAttribute("aria-pressed", on);
  });
  pair.append(slider);
  pair.parentElement.querySelector("h3").append(button);
}

for (const block of document.querySelectorAll(".code")) {
  if (!navigator.clipboard) break;
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(block.querySelector("code").textContent);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  block.append(button);
}

const rows = JSON.parse(document.getElementById("readout").textContent);
const charts = [...document.querySelectorAll(".lines")].map((chart) => {
  const output = document.createElement("output");
  chart.parentElement.append(output);
  return { chart, output, cursor: chart.querySelector(".cursor"), data: chart.dataset };
});

function nearest(step) {
  let low = 0, high = rows.step.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (rows.step[middle] < step) low = middle; else high = middle;
  }
  return step - rows.step[low] < rows.step[high] - step ? low : high;
}

function text(key, row) {
  const value = rows[key][row] ?? "not a number";
  const more = key === "loss" && rows.smoothed[row] !== null ? `, smoothed ${rows.smoothed[row]}` : "";
  const unit = key === "seconds" ? " s" : "";
  return `step ${rows.step[row]}: ${value}${unit}${more}`;
}

function point(event, one) {
  const place = one.chart.getBoundingClientRect();
  const first = Number(one.data.first), last = Number(one.data.last);
  const row = nearest(first + ((event.clientX - place.left) / place.width) * (last - first));
  for (const { chart, output, cursor, data } of charts) {
    const x = (100 * (rows.step[row] - data.first)) / (data.last - data.first) + "%";
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
    output.textContent = text(data.key, row);
    chart.parentElement.classList.add("on");
  }
}

for (const one of charts) {
  one.chart.addEventListener("pointermove", (event) => point(event, one));
  one.chart.addEventListener("pointerdown", (event) => point(event, one));
  one.chart.addEventListener("pointerleave", () => {
    for (const { chart, output } of charts) {
      chart.parentElement.classList.remove("on");
      output.textContent = "";
    }
  });
}
