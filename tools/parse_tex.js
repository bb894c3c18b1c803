// node parse_tex.js MATHJAX_FOLDER < request.json > errors.json
// The request is {macros, formulas: [{tex, display}]}; the answer has one
// entry per formula: null, or why MathJax cannot parse it.
const path = require("path");
const fs = require("fs");

const folder = path.resolve(process.argv[2]);
const { macros, formulas } = JSON.parse(fs.readFileSync(0, "utf8"));

async function problem(MathJax, { tex, display }) {
  let mml;
  try {
    mml = await MathJax.tex2mmlPromise(tex, { display });
  } catch (error) {
    return String(error.message || error);
  }
  if (!mml.includes("merror")) return null;
  const found = mml.match(/data-mjx-error="([^"]*)"/);
  return found ? found[1] : "merror";
}

require(path.join(folder, "node-main.js"))
  .init({
    loader: { load: ["input/tex"] },
    // The packages of the pages, without the one that shows an unknown macro
    // in red instead of saying so.
    tex: { macros, packages: { "[-]": ["noundefined"] } },
  })
  .then(async (MathJax) => {
    const answer = [];
    for (const formula of formulas) {
      answer.push(await problem(MathJax, formula));
    }
    process.stdout.write(JSON.stringify(answer));
  })
  .catch((error) => {
    console.error(error);
    process.exit(2);
  });
