"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const deepest = data.layers[data.layers.length - 1];
  const percent = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 1 });

  const option = (value, text) => {
    const made = document.createElement("option");
    made.value = value;
    made.textContent = text;
    return made;
  };
  // As many digits as a threshold has, two or more behind the point.
  const named = (threshold) => {
    const short = threshold.toFixed(2);
    return Number(short) === threshold ? short : String(threshold);
  };
  const curveOf = (answer) => `${answer.measure}, ${answer.kv_policy}`
    + (answer.exits === null ? "" : `, exits ${answer.exits}`);

  // A token per element, its background as deep as the layers behind it.
  const token = (answer, index) => {
    const made = document.createElement("span");
    const layer = answer.exit_layers[index];
    const agrees = answer.agrees[index];
    made.className = agrees ? "token" : "token differs";
    made.style.setProperty("--depth", layer / deepest);
    made.textContent = answer.token_texts[index];
    made.title = `layer ${layer}, confidence ${answer.confidences[index].toFixed(3)}, `
      + (agrees ? "the full model's choice" : "not the full model's choice");
    return made;
  };

  const show = (place, scores, item, answer) => {
    if (answer.logprobs) {
      // Where a choice cannot be answered with, none is chosen.
      const best = answer.logprobs.includes(null) ? NaN : Math.max(...answer.logprobs);
      at(place).textContent = item.choices.map((choice, index) => {
        const logprob = answer.logprobs[index];
        const mark = logprob === best ? ">" : " ";
        const gold = index === item.gold ? " (right)" : "";
        return `${mark} ${logprob === null ? "-inf" : logprob.toFixed(2)}  ${choice}${gold}`;
      }).join("\n");
      at(scores).textContent = "";
      return;
    }
    at(place).replaceChildren(...answer.token_texts.map((_, index) => token(answer, index)));
    const agreeing = answer.agrees.filter(Boolean).length / answer.agrees.length;
    const parts = [`${percent.format(agreeing)} agreement`];
    for (const [name, value] of Object.entries(answer.scores)) {
      parts.push(`${name.replaceAll("_", " ")} ${value.toFixed(2)}`);
    }
    at(scores).textContent = parts.join(", ");
  };

  const draw = () => {
    const index = Number(at("item").value);
    const item = data.items[index];
    at("prompt").textContent = item.prompt;
    const reference = item.choices.length ? null : item.reference;
    at("reference").textContent = reference ?? "";
    at("reference").hidden = at("reference-head").hidden = reference === null;
    const full = item.answers.find((answer) => answer.threshold === null);
    show("full", "full-scores", item, full);
    const chosen = item.answers.find((answer) => answer.threshold !== null
      && curveOf(answer) === at("curve").value && String(answer.threshold) === at("threshold").value);
    show("answer", "scores", item, chosen ?? full);
    at("previous").disabled = index === 0;
    at("next").disabled = index === data.items.length - 1;
  };

  at("item").append(...data.items.map((item, index) => option(
    index, `${index + 1} ${item.task}: ${item.prompt.trim().split("\n").pop().slice(0, 48)}`)));
  const early = data.items[0].answers.filter((answer) => answer.threshold !== null);
  at("curve").append(...[...new Set(early.map(curveOf))].map((name) => option(name, name)));
  const thresholds = [...new Set(early.map((answer) => answer.threshold))];
  at("threshold").append(...thresholds.map((one) => option(String(one), named(one))));
  at("threshold").value = String(thresholds[Math.floor(thresholds.length / 2)]);

  const words = document.createElement("span");
  words.textContent = "tokens by number of layers:";
  at("legend").append(words, ...data.layers.map((layer) => {
    const made = document.createElement("b");
    made.style.setProperty("--depth", layer / deepest);
    made.textContent = layer;
    return made;
  }));
  const differs = document.createElement("span");
  differs.className = "token differs";
  differs.style.background = "none";
  differs.textContent = "not the full model's choice";
  at("legend").append(differs);

  const step = (by) => {
    at("item").value = String(Number(at("item").value) + by);
    draw();
  };
  at("choice").addEventListener("change", draw);
  at("choice").addEventListener("submit", (event) => event.preventDefault());
  at("previous").addEventListener("click", () => step(-1));
  at("next").addEventListener("click", () => step(1));
  draw();
})();
