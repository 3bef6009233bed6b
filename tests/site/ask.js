// Puts questions to a built site's search, as a browser does: the theme's own worker searches the
// site's own index.
//
//   node ask.js SITE QUESTION...    prints a list in JSON: for each question the pages found, best first

const fs = require("node:fs");
const path = require("node:path");
const vm = require("node:vm");

const [site, ...questions] = process.argv.slice(2);
const index = JSON.parse(fs.readFileSync(path.join(site, "search", "search_index.json"), "utf8"));
const workers = path.join(site, "assets", "javascripts", "workers");
const [worker] = fs.readdirSync(workers).filter((name) => /^search\..*\.js$/.test(name));

// What a worker has in a browser: itself, a listener, and a place for answers.
const answers = [];
let listener;
globalThis.self = globalThis;
globalThis.addEventListener = (_, heard) => (listener = heard);
globalThis.postMessage = (answer) => answers.push(answer);
vm.runInThisContext(fs.readFileSync(path.join(workers, worker), "utf8"));

const [SETUP, QUERY] = [0, 2]; // the kinds of messages that the worker hears
const ask = async (type, data) => {
  const before = answers.length;
  listener({ data: { type, data } });
  while (answers.length === before) await new Promise((done) => setTimeout(done));
  return answers.pop().data;
};

(async () => {
  await ask(SETUP, { config: index.config, docs: index.docs, options: { suggest: false } });
  const found = [];
  for (const question of questions) {
    const { items } = await ask(QUERY, question);
    // A result is a page and its sections that match; a section's address goes on after a `#`.
    found.push(items.map((sections) => sections[0].location.split("#")[0]));
  }
  console.log(JSON.stringify(found));
})();
