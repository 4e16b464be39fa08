// Shows the posts that the filters choose; the #fragment takes the choice to other pages.
const filters = [...document.querySelectorAll('select')];
const posts = [...document.querySelectorAll('article')];

function show() {
  const wanted = filters.map(filter => filter.value).filter(Boolean), hash = '#' + wanted.join('+');
  for (const post of posts)
    post.hidden = !wanted.every(kind => post.dataset.kinds.split(' ').includes(kind));
  for (const link of document.querySelectorAll('nav a')) link.hash = hash;
  history.replaceState(null, '', hash);
  const shown = posts.filter(post => !post.hidden).length;
  document.querySelector('output').value = `${shown} of the ${posts.length} posts on this page`;
}

const chosen = location.hash.slice(1).split('+');
for (const filter of filters)
  for (const option of filter.options) option.selected ||= chosen.includes(option.value);
document.querySelector('.filters').addEventListener('change', show);
document.querySelector('.filters').hidden = false;
show();
