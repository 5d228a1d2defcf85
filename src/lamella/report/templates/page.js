(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`)?.value;
  const onChoice = (name, act) =>
    document.querySelectorAll(`input[name="${name}"]`).forEach((input) => input.addEventListener("change", act));

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
})();
