/* The chat page's own: sending, prompts to try, the card of a token, files, staying at the foot. */
(() => {
  'use strict';
  const qa = window.qa;
  const page = '/chat';
  const here = () => (location.pathname.replace(/\/$/, '') || '/') === page;
  const near = (event, selector) => event.target.closest && event.target.closest(selector);
  const find = (selector) => document.querySelector(`.chat ${selector}`);
  const field = () => document.getElementById('prompt');

  /* ---- asking --------------------------------------------------------------------------------- */
  /* An address names its conversation from the first prompt on; the server keeps it per browser. */
  function named() {
    if (qa.params().get('chat')) return;
    const bytes = crypto.getRandomValues(new Uint8Array(10));
    const id = [...bytes].map((b) => b.toString(16).padStart(2, '0')).join('');
    qa.setParams({ chat: id }, { silent: true, replace: true });
  }
  function send() {
    const box = field(), button = find('[data-send]');
    if (!box || button.matches('[aria-busy]')) return;
    if (!box.value.trim()) { box.focus(); return; }
    named();
    atFoot = true;
    button.setAttribute('aria-busy', 'true');
    box.focus({ preventScroll: true });
    box.dataset.sent = box.value;
    qa.act({ do: 'send', text: box.value });
  }
  let warmed = null;
  document.addEventListener('focusin', (event) => {
    if (!here() || event.target.id !== 'prompt' || warmed === location.search) return;
    warmed = location.search;
    qa.act({ do: 'warm' });
  });
  document.addEventListener('keydown', (event) => {
    if (!here() || event.target.id !== 'prompt' || event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  document.addEventListener('click', (event) => {
    if (!here()) return;
    let on;
    if (near(event, '[data-opens]')) named();
    if (near(event, '[data-send]')) send();
    else if ((on = near(event, '[data-prompt]'))) {
      const box = field();
      box.value = on.dataset.prompt;
      document.querySelectorAll('.chat details[data-menu][open]').forEach((d) => { d.open = false; });
      box.focus();
    } else if ((on = near(event, '[data-link]'))) link(on);
    else if (near(event, '.ask .stop') && matchMedia('(hover: hover)').matches) field().focus({ preventScroll: true });
  }, true); /* before the page's own listener: an action needs the conversation's name */

  /* The address without its conversation: for whoever opens it, it offers to ask the same again. */
  function link(on) {
    const url = new URL(location.href);
    for (const name of ['chat', 'turn']) url.searchParams.delete(name);
    on.dataset.copy = url.href;
    qa.toast(url.searchParams.has('q') ? 'The link is copied: it offers to ask the same again.'
      : 'The link is copied without the prompts, which are too long for one.');
  }

  /* ---- order: a look that began before a newer one but came after it is looked at again --------- */
  const live = qa.live;
  qa.live = (element, props, watch) => {
    let newest = 0;
    live(element, props, (name, draw) => watch(name, () => {
      const drawn = Number(/^<i hidden data-drawn="(\d+)"/.exec(props.value || '')?.[1] || newest);
      if (drawn < newest) { qa.moved(100); return; }
      newest = drawn;
      draw();
    }));
  };

  /* ---- files: the server sends the text, the browser writes it ---------------------------------- */
  const wire = qa.wire;
  qa.wire = (props, watch, trigger) => {
    wire(props, watch, trigger);
    watch('value', () => {
      const { save } = props.value ? JSON.parse(props.value) : {};
      if (!save) return;
      const url = URL.createObjectURL(new Blob([save.text], { type: 'text/plain' }));
      const link = Object.assign(document.createElement('a'), { href: url, download: save.name });
      link.click();
      setTimeout(() => URL.revokeObjectURL(url), 10000);
    });
  };

  /* ---- staying at the foot while answers grow, unless somebody scrolled away -------------------- */
  let atFoot = false;
  const foot = () => document.documentElement.scrollHeight - innerHeight - scrollY < 60;
  addEventListener('scroll', () => { if (here()) { atFoot = foot(); if (card) place(owner); } }, { passive: true });
  function follow() { if (atFoot && !card?.contains(document.activeElement)) scrollTo({ top: document.documentElement.scrollHeight }); }

  /* ---- the card of a token ---------------------------------------------------------------------- */
  let card = null, owner = null, leaving = null, returning = false;
  const el = (name, attributes = {}, ...children) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) if (value !== null && value !== undefined) node.setAttribute(key, value);
    node.append(...children.filter((c) => c !== null));
    return node;
  };
  const percent = (p) => (p >= 0.0995 ? (100 * p).toFixed(0) : p >= 1e-4 ? (100 * p).toPrecision(2) : '< 0.01') + ' %';
  function facts(token) {
    const box = token.closest('.tokens'), at = Number(token.dataset.at);
    const data = JSON.parse(box.dataset.tokens), text = (i) => data.texts[i];
    const taken = data.own[at];
    const parts = data.parts && data.parts[0] === at ? { token: data.parts[1], text: text(data.parts[2]) } : null;
    const list = (rows) => rows && rows[at] ? rows[at].map(([id, i, p]) => ({ token: id, text: text(i), p })) : [];
    return { run: box.dataset.run, fork: box.hasAttribute('data-fork'), at, taken: { token: taken[0], text: text(taken[1]) },
      kld: data.kld ? data.kld[at] : null, base: list(data.base), own: list(data.top), parts };
  }
  function row(fact, choice) {
    const same = choice.token === fact.taken.token;
    const content = [el('span', { class: 'text' }, choice.text), el('span', { class: 'chance', 'aria-hidden': 'true' }, el('i', { style: `width:${(100 * choice.p).toFixed(1)}%` })), el('span', { class: 'share' }, percent(choice.p))];
    if (same || !fact.fork) return el('li', { class: same ? 'taken' : '' }, ...content, same ? el('span', { class: 'unseen' }, 'taken') : null);
    return el('li', {}, el('button', { class: 'choice', 'data-act': forked(fact, choice), title: 'Continue from here with this token' }, ...content));
  }
  const forked = (fact, choice) => JSON.stringify({ do: 'fork', run: fact.run, at: fact.at, token: choice.token });
  function lists(fact) {
    if (!fact.base.length) return null;
    const list = (title, choices) => el('section', {}, el('h4', {}, title), el('ol', {}, ...choices.map((c) => row(fact, c))));
    return el('div', { class: 'lists' }, list('16-bit model', fact.base), fact.own.length ? list('This variant', fact.own) : null);
  }
  function other(fact) {
    if (!fact.fork) return null;
    const choice = fact.parts || [...fact.base, ...fact.own].find((c) => c.token !== fact.taken.token);
    return choice ? el('button', { class: 'button go', 'data-act': forked(fact, choice) }, 'Continue from here with ', el('q', {}, choice.text)) : null;
  }
  function show(token) {
    clearTimeout(leaving);
    if (owner === token && card) return;
    hide();
    owner = token;
    const fact = facts(token);
    const head = el('p', {}, el('b', {}, `Token ${fact.at + 1} `), el('q', {}, fact.taken.text));
    if (fact.kld !== null && fact.kld !== undefined) head.append(` KL divergence ${fact.kld} nats.`);
    if (fact.parts) head.append(el('span', {}, ' The 16-bit answer has ', el('q', {}, fact.parts.text), ' here.'));
    card = el('div', { class: 'live token-card', role: 'dialog', 'aria-label': `Token ${fact.at + 1}` }, head, lists(fact), other(fact));
    card.addEventListener('mouseenter', () => clearTimeout(leaving));
    card.addEventListener('mouseleave', leave);
    card.addEventListener('click', (event) => { if (event.target.closest('[data-act]')) setTimeout(hide, 0); });
    document.body.append(card);
    place(token);
  }
  function place(token) {
    const at = token.getClientRects()[0] || token.getBoundingClientRect(), margin = 8;
    if (at.bottom < 0 || at.top > innerHeight) { hide(); return; }
    const left = Math.min(Math.max(margin, at.left - 12), innerWidth - card.offsetWidth - margin);
    const below = at.bottom + 6 + card.offsetHeight < innerHeight || at.top < card.offsetHeight + 12;
    card.style.left = `${left}px`;
    card.style.top = `${below ? at.bottom + 6 : at.top - card.offsetHeight - 6}px`;
  }
  function hide() {
    clearTimeout(leaving);
    const back = card?.contains(document.activeElement) ? owner : null;
    card?.remove();
    card = owner = null;
    if (back?.isConnected) { returning = true; back.focus({ preventScroll: true }); returning = false; }
  }
  function leave() { clearTimeout(leaving); leaving = setTimeout(() => { if (!card?.contains(document.activeElement) && document.activeElement !== owner) hide(); }, 250); }
  const TOKEN = '.tokens .tok[data-at]';
  document.addEventListener('mouseover', (event) => {
    const token = near(event, TOKEN);
    if (token) { clearTimeout(leaving); leaving = setTimeout(() => token.isConnected && show(token), card ? 60 : 120); }
    else if (card && !card.contains(event.target)) leave();
  });
  document.addEventListener('focusin', (event) => {
    const token = near(event, TOKEN);
    if (returning) return;
    if (token) { show(token); say(token); } else if (card && !card.contains(event.target)) hide();
  });
  document.addEventListener('click', (event) => {
    const token = near(event, TOKEN);
    if (token) { token.focus({ preventScroll: true }); show(token); } else if (card && !card.contains(event.target)) hide();
  });
  /* For ears: what the tints and the card show. */
  function say(token) {
    const fact = facts(token), box = document.getElementById('qa-announce');
    const top = fact.base[0];
    if (box) box.textContent = `Token ${fact.at + 1}, ${fact.taken.text.trim() || 'blank'}` + (fact.kld === null ? '' : `, divergence ${fact.kld} nats`)
      + (top ? `, 16-bit: ${top.text.trim() || 'blank'} ${percent(top.p)}` : '') + (fact.parts ? ', here they part' : '');
  }
  document.addEventListener('keydown', (event) => {
    if (!here()) return;
    if (event.key === 'Escape' && card) { event.stopPropagation(); hide(); return; }
    const token = near(event, TOKEN);
    if (!token || event.ctrlKey || event.metaKey || event.altKey) return;
    const all = [...token.closest('.tokens').querySelectorAll('.tok[data-at]')], at = all.indexOf(token);
    const marked = all.findIndex((t) => t.classList.contains('parts'));
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1, p: marked }[event.key];
    if (next !== undefined) {
      event.preventDefault(); event.stopPropagation();
      const to = all[Math.min(Math.max(next, 0), all.length - 1)];
      to.scrollIntoView({ block: 'nearest' });
      to.focus({ preventScroll: true });
    } else if (event.key === 'Enter' || event.key === ' ') {
      event.preventDefault(); event.stopPropagation();
      show(token); card.querySelector('button')?.focus();
    }
  }, true);

  /* ---- keys of this page ------------------------------------------------------------------------ */
  const press = (selector) => { const on = [...document.querySelectorAll(`.chat ${selector}`)].find((e) => e.offsetParent); on?.click(); };
  qa.keys.push({ page, key: 'p', words: 'Where they part', run: () => press('[data-part]') });
  qa.keys.push({ page, key: 'r', words: 'Ask again', run: () => press('[data-again]') });
  qa.keys.push({ page, key: 's', words: 'Stop', run: () => press('.ask .stop') });

  const start = () => new MutationObserver((changes) => {
    if (!here()) return;
    if (owner && !owner.isConnected) hide();
    const element = (node) => (node.nodeType === 1 ? node : node.parentElement);
    if (changes.some((c) => element(c.target)?.closest('.turns'))) follow();
  }).observe(document.body, { childList: true, subtree: true, characterData: true });
  document.body ? start() : addEventListener('DOMContentLoaded', start);
})();
