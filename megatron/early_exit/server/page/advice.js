/**
 * Why exits have saved no time, and what to try.
 */

const MANY = 0.5;
const LEAST_ACCEPTED = 0.6;
// Below it, an exit is wrong about as often as right.
const DOUBTFUL = 0.2;
const FEW_TOKENS = 16;

const percent = (share) => `${Math.round(100 * share)} %`;

/**
 * @typedef {object} Advice
 * @property {string[]} reasons sentences
 * @property {{label: string, changes: object}|null} action the settings to ask again with
 */

/**
 * What to say of an answer; null where exits have done well, or nobody knows.
 *
 * @param {object} answer
 * @param {import("./run.js").Run} answer.run
 * @param {boolean|null} answer.isSlow whether it was slower than the full model, null if not known
 * @param {boolean} answer.isFirst whether it is the page's first
 * @returns {Advice|null}
 */
export function adviceOn({ run, isSlow, isFirst }) {
  const { tokens } = run.transcript;
  if (tokens.length === 0 || run.body.mode === "full" || isSlow === false) return null;
  const advice = run.body.mode === "early_exit" ? onExits(run) : onDrafts(run);
  if (isSlow === null) return advice.isSure ? advice : null;
  if (tokens.length < FEW_TOKENS) {
    advice.reasons.push(`Besides, ${tokens.length} tokens are too few to tell a speed.`);
  }
  if (isFirst) {
    advice.reasons.push(
      "If the server has just started, its first answers are slower than later ones: ask again before you judge.",
    );
    advice.action ??= { label: "Ask again", changes: {} };
  }
  return advice;
}

function onExits({ transcript: { tokens }, depths, body }) {
  const { numLayers } = depths;
  const exits = body.exit_layers ?? depths.layers.slice(0, -1).filter((layer) => layer > 0);
  const inFull = tokens.filter(({ layer }) => layer === numLayers).length / tokens.length;
  if (inFull < MANY) {
    const saved = 1 - tokens.reduce((sum, { layer }) => sum + layer, 0) / tokens.length / numLayers;
    const advice = {
      isSure: false,
      reasons: [
        `The tokens skipped ${percent(saved)} of the layers, but asking the exits took as much time as that saved, or more. It does so where the layers themselves are quick, as in a small model.`,
      ],
      action: null,
    };
    if (exits.length > 1) {
      const best = mostUsed(tokens, exits);
      advice.action = { label: `Ask again with exit ${best} alone`, changes: { exits: [best] } };
    }
    return advice;
  }
  const reasons = [
    `${percent(inFull)} of the tokens ran all ${numLayers} layers, and asking the exits on the way took time too.`,
  ];
  const half = thresholdOfHalf(tokens, numLayers);
  if (half === null) {
    reasons.push("Lower the threshold. Where the guess of every exit is recorded, this page can say how far.");
    return { isSure: true, reasons, action: null };
  }
  if (half === 0) {
    reasons.push("The exits were not sure of anything: have they been trained?");
    return { isSure: true, reasons, action: null };
  }
  const threshold = half.toFixed(2);
  reasons.push(`At a threshold of ${threshold}, half of these tokens would have left sooner.`);
  if (half < DOUBTFUL) {
    reasons.push("So unsure guesses are often wrong, though: exits that are trained longer are surer.");
  }
  return {
    isSure: true,
    reasons,
    action: { label: `Ask again with ${threshold}`, changes: { threshold: half } },
  };
}

function onDrafts({ figures: { metrics }, depths, body }) {
  const rate = metrics?.speculative_decoding?.draft_acceptance_rate ?? 1;
  const deeper = depths.layers.find((layer) => layer > body.draft_exit_layer && layer < depths.numLayers);
  if (rate >= LEAST_ACCEPTED) {
    const reason =
      "Drafting and verifying took as much time as they saved, or more. They do so where the layers themselves are quick, as in a small model.";
    return { isSure: false, reasons: [reason], action: null };
  }
  return {
    isSure: false,
    reasons: [`Only ${percent(rate)} of the drafts were accepted, and the others took time for nothing.`],
    action: deeper
      ? { label: `Ask again with drafts from layer ${deeper}`, changes: { draftExit: deeper } }
      : null,
  };
}

const mostUsed = (tokens, exits) => {
  const uses = (exit) => tokens.filter(({ layer }) => layer === exit).length;
  return exits.reduce((best, exit) => (uses(exit) > uses(best) ? exit : best));
};

/** The threshold, down to hundredths, at which half of the tokens would have left at an exit; null
 * where the exits' guesses are not known. */
function thresholdOfHalf(tokens, numLayers) {
  const surest = tokens
    .map(({ heads }) => heads.filter(({ layer }) => layer < numLayers))
    .filter((heads) => heads.length > 0)
    .map((heads) => Math.max(...heads.map(({ confidence }) => confidence)))
    .sort((a, b) => b - a);
  if (surest.length === 0) return null;
  // Rounded first, for 0.29 is a little less in binary.
  return Math.floor(Number((100 * surest[Math.ceil(surest.length / 2) - 1]).toFixed(6))) / 100;
}
